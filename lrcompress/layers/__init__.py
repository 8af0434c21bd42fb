"""Low-rank layers, and how to find, replace, run and optimize the FFN layers of a model in memory."""
