"""Comparison of two results documents."""
