"""Build a bundle from a base model and a guide: export, compile, compare."""
