"""Tells people, files, Prometheus and trackers how a run goes."""
