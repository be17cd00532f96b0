"""Serving: requests of many clients share an engine's calls, over HTTP interfaces."""
