"""INT8: calibration, the record, the sweep and quantise/dequantise pairs."""
