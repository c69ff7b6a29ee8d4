"""The teacher server: hidden states of a frozen model for any number of training jobs."""
