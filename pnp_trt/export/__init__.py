"""From PyTorch modules to checked ONNX graphs."""
