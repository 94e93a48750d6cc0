"""A scan in, an explanation on the scan's own grid out."""
