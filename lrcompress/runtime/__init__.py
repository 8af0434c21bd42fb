"""Errors, progress, safe files and processes: knows nothing of models, imports no torch."""
