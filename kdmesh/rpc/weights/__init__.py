"""A new student's weights on their way to servers."""
