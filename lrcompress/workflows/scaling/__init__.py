"""A scaling study: models trained from scratch at several sizes, and the laws of their losses."""
