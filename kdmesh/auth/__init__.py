"""Who calls a server, and what they may do; what clients show of themselves."""
