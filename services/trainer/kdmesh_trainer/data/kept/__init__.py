"""Datasets as token ids in files, which are made once."""
