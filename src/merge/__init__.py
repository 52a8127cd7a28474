"""Merge methods, one file each, and the stage that applies them to adapters."""
