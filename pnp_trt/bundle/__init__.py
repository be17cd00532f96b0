"""A bundle on disk: its manifest, and the checks on everything that a bundle brings along.

A bundle may come from a stranger.  Nothing here imports an inference runtime or a training library.
"""
