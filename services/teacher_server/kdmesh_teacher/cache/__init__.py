"""Rows that were computed before, kept in memory and on disk."""
