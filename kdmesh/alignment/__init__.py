"""Matches what two tokenizers make of the same text, by the bytes that tokens stand for."""
