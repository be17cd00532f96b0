"""Serving: requests of many clients in one engine's calls, and the HTTP interfaces over it."""
