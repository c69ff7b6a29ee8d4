"""Optimizers over shards, their moments, and the learning rate."""
