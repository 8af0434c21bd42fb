"""Finetuning of compressed models and pretraining of new ones, on the Trainer of transformers."""
