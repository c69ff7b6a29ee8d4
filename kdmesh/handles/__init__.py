"""Handles: rows that stay where they were written, lent to readers on this node or streamed to others."""
