"""Precision recipes: the types that a network computes in."""
