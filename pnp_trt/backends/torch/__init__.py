"""PyTorch modules, eager or compiled."""
