"""Compresses a model larger than memory, one block at a time."""
