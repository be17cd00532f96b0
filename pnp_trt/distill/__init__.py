"""Trainers of guides."""
