"""Samples of rollout servers: asked for, and as messages."""
