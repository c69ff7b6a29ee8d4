"""The servers that have one model: found, chosen between, and done without when they fail."""
