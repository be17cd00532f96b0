"""Figures of a guide's feature maps and of their strength over steps and guidance scales."""
