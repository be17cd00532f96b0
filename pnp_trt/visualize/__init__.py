"""Inside a guide: its feature maps and their strength over steps and guidance scales."""
