"""lm-eval tasks: resolved by name, run on a loaded model, with cached results."""
