"""Trainers that make guides."""
