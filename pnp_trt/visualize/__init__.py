"""What a guide does inside: its feature maps and their strength over steps and guidance scales."""
