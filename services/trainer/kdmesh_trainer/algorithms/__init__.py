"""How the rows of student and teacher become a loss."""
