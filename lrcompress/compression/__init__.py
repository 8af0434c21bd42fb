"""Compresses a model: calibrates, plans, replaces layers and refines them."""
