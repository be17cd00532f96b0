"""Precision recipes: the element types in which a network computes."""
