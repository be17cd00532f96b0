"""Measurements: compute, latency, memory, energy and cold start."""
