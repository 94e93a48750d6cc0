"""CAMs of tensors: `BaseCAM`, the methods by name, and what they return."""
