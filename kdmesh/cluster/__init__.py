"""Kubernetes: training jobs sent there, looked at and ended, and servers found there."""
