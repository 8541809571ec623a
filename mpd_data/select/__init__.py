"""Decide which rewrites are kept."""
