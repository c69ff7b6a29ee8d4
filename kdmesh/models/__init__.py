"""Hugging Face causal language models, run over packed sequences."""
