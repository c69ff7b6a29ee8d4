"""The jobs that share a server, and their requests that wait."""
