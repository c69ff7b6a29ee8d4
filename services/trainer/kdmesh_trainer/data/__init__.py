"""Rows of files made into token sequences, kept or made on demand."""
