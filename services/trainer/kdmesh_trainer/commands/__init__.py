"""The command lines beside training, each run by python -m."""
