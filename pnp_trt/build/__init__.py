"""From a base and a guide to a bundle: export, compile, compare."""
