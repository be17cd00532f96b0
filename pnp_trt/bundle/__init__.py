"""Bundles on disk: the manifest, and checks of all files of a bundle.

Bundles are untrusted input.  This package imports no inference runtime and no training library.
"""
