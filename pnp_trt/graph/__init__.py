"""ONNX files and their weights."""
