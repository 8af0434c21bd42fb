"""Policies that share out a parameter budget over the FFNs of a model."""
