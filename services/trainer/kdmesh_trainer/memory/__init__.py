"""The memory of one rank, found before it is taken."""
