"""From the name of a text to token blocks, windows and fingerprints."""
