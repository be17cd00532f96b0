"""TensorRT and TensorRT for RTX: compiling, loading and refitting engines."""
