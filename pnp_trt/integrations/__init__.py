"""Guides inside other libraries."""
