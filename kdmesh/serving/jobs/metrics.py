"""Counters and histograms by job, with a bound on how many jobs there can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Set

from prometheus_client import CollectorRegistry, Counter, Histogram

from kdmesh.serving.jobs.table import FORGET_S

JOB = "kdmesh_job"  # the label; not "job", which Prometheus has for what it scrapes
MAX_JOBS = 256  # distinct values of a label; names come from clients
OTHERS, UNNAMED = "(others)", "(unnamed)"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class JobMetrics:
    """The numbers of one server, in a registry of its own. Written and read on the event loop only."""

    def __init__(self, namespace: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._namespace = namespace
        self._clock = clock
        self._heard_s: dict[str, float] = {}  # when a label was last used
        self._by_job: list[Counter | Histogram] = []
        self.label_names: dict[str, tuple[str, ...]] = {}
        """Of each counter and histogram, by its whole name."""

        self._unusable_files = self.counter(
            "unusable_files", "Changes of a file of tokens, keys, certificates or jobs that were of no use.", "key"
        )

    def unusable(self, key: str) -> Callable[[], None]:
        """Counts changes of the files that `key` names that were of no use.

        The count begins with 0 now: Prometheus sees no increase in what is not there before it is 1.
        """
        return self._unusable_files.labels(key).inc

    def job_label(self, job: str) -> str:
        """The job's name, or one common name while there are too many."""
        label = job or UNNAMED
        if label not in self._heard_s and len(self._heard_s) >= MAX_JOBS:
            return OTHERS
        self._heard_s[label] = self._clock()
        return label

    def forget_silent(self, present: Set[str]) -> None:
        """Drop the numbers of jobs that have left: nothing was counted for long, and they are not among those present.

        Args:
            present: names of jobs that hold something, or wait.
        """
        limit_s = self._clock() - FORGET_S
        labels = {job or UNNAMED for job in present}
        for label in [label for label, heard_s in self._heard_s.items() if heard_s <= limit_s and label not in labels]:
            del self._heard_s[label]
            for metric in self._by_job:
                metric.remove_by_labels({JOB: label})

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A new counter."""
        self.label_names[f"{self._namespace}_{name}"] = labels
        counter = Counter(name, text, labels, namespace=self._namespace, registry=self.registry)
        if JOB in labels:
            self._by_job.append(counter)
        return counter

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        """A new histogram of seconds."""
        self.label_names[f"{self._namespace}_{name}"] = labels
        histogram = Histogram(name, text, labels, namespace=self._namespace, registry=self.registry, buckets=_SECONDS)
        if JOB in labels:
            self._by_job.append(histogram)
        return histogram
