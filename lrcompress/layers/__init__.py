"""Low-rank layers, and finding, replacing, running and optimizing FFN layers in memory."""
