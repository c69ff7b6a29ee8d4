"""The rollout server: samples from a student whose weights a trainer replaces."""
