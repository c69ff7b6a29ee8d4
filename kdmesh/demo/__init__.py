"""The demo: one teacher, two students, on text that every machine with Python has."""
