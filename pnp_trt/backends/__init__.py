"""Inference engines behind one small interface; each module imports its runtime lazily."""
