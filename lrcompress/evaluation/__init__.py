"""Quality of models side by side: perplexity, tasks, and differences between models."""
