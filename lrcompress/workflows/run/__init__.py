"""A run: factorize, finetune, evaluate and report as one recipe says, in one folder."""
