"""Teachers, guides, and the student that joins them (PyTorch)."""
