"""Counters and histograms by job, with a bound on how many jobs there can be."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_MAX_JOBS = 64  # distinct values of a label; names come from clients
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class JobMetrics:
    """The numbers of one server, in a registry of its own. Written and read on the event loop only."""

    def __init__(self, namespace: str) -> None:
        self.registry = CollectorRegistry()
        self._namespace = namespace
        self._jobs: set[str] = set()

    def job_label(self, job: str) -> str:
        """The job's name, or one common name once there are too many."""
        if job not in self._jobs:
            if len(self._jobs) >= _MAX_JOBS:
                return "(others)"
            self._jobs.add(job)
        return job or "(unnamed)"

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A new counter."""
        return Counter(name, text, labels, namespace=self._namespace, registry=self.registry)

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        """A new histogram of seconds."""
        return Histogram(name, text, labels, namespace=self._namespace, registry=self.registry, buckets=_SECONDS)
