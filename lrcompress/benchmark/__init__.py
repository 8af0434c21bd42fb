"""Measured time and counted operations: whole models, one FFN, and training steps."""
