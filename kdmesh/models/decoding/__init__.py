"""A model run token by token."""
