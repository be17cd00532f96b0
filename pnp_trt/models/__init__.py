"""Teachers, guides, and the student that combines them (PyTorch)."""
