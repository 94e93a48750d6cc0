"""The user's network: its layers and outputs, touched inside one `with` that puts all back."""
