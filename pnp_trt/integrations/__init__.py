"""Guides in other libraries."""
