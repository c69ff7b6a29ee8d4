"""Traces: where the time of one step went, in the trainer and in the servers that it asked."""
