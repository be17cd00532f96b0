"""ONNX Runtime on the CPU and CUDA providers."""
