"""Compression algorithms on matrices and parameter counts alone: no model, no transformers."""
