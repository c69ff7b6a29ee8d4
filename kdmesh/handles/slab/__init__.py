"""Shared memory that a server lends to processes of its node."""
