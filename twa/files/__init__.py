"""Checkpoints: reading their files and folders, fitting them to a model, and averaging them."""
