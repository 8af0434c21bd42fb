"""Measures moments and probes on the calibration text."""
