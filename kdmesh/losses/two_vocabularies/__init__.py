"""Losses between models that have two tokenizers."""
