"""Rows of a teacher's servers: asked for, sent and taken."""
