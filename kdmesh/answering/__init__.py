"""Served models that answer the prompts of `kdmesh generate`: those of kdmesh, and those behind an OpenAI API."""
