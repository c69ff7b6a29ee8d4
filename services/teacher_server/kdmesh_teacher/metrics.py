"""The numbers that /metrics shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kdmesh.handles.slab.reports import Snapshot
from kdmesh.serving.jobs.families import job_families
from kdmesh.serving.jobs.metrics import JOB, JobMetrics
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.server_families import served_families
from kdmesh.types import SleepTag, TokenSequence
from kdmesh_teacher.cache.report import CacheState, TierState
from kdmesh_teacher.work import Work

_NAMESPACE = "kdmesh_teacher"
_SENDING_DOORS = ("rdma", "stream", "collective")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What is true at the moment of a scrape."""

    slab: Snapshot
    jobs: Sequence[JobState]
    waiting_tokens: int
    waiting_requests: int
    cached_tokens: int
    engine_tokens_per_s: float  # 0 before the first batch
    model: str
    weight_version: int
    weights_updated_at_s: float | None  # Unix time; None: they are those of the start
    cache: CacheState | None  # None: nothing is kept
    asleep: frozenset[SleepTag]


class Metrics(JobMetrics):
    """Counters and histograms; a job is known by the name its sessions were opened with.

    Written and read on the event loop only.
    """

    def __init__(self) -> None:
        super().__init__(_NAMESPACE)
        self._tokens = self.counter("tokens", "Tokens prefilled.", JOB)
        self._rows = self.counter("rows", "Rows computed.", JOB)
        self._requests = self.counter("requests", "Requests by what came of them.", JOB, "outcome")
        self._cache_hits = self.counter("cache_hits", "Sequences that the cache had.", JOB)
        self._cache_misses = self.counter("cache_misses", "Sequences that the cache did not have.", JOB)
        self._cache_hit_tokens = self.counter("cache_hit_tokens", "Tokens of what the cache had: not prefilled.", JOB)
        self._cache_hit_bytes = self.counter("cache_hit_bytes", "Bytes of rows from the cache.", JOB)
        self._sent_bytes = dict.fromkeys(_SENDING_DOORS, 0)
        self._queue_seconds = self.histogram("queue_seconds", "From arrival to the start of the prefill.", JOB)
        self._engine_seconds = self.histogram("engine_seconds", "Duration of a batch in the engine.")

    def watch(self, look: Callable[[], Gauges]) -> None:
        """Show what `look` finds at every scrape; called once, when the server is ready."""
        self.registry.register(_Collector(look, self))

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        """Bytes that clients were sent, by door."""
        return self._sent_bytes

    def batch_done(self, works: Sequence[Work], *, started_s: float, engine_s: float) -> None:
        """A batch has come from the engine, well or not."""
        self._engine_seconds.observe(engine_s)
        for work in works:
            job = self.job_label(work.job)
            self._tokens.labels(job).inc(work.num_tokens_to_compute())
            self._rows.labels(job).inc(sum(sequence.num_rows for sequence in work.to_compute()))
            self._queue_seconds.labels(job).observe(started_s - work.arrived_s)

    def cache_used(
        self, name: str, sequences: Sequence[TokenSequence], is_kept: Sequence[bool], *, row_bytes: int
    ) -> None:
        """A job's request is answered, with rows from the cache for some of its sequences."""
        job = self.job_label(name)
        hits = tuple(compress(sequences, is_kept))
        self._cache_hits.labels(job).inc(len(hits))
        self._cache_misses.labels(job).inc(len(sequences) - len(hits))
        self._cache_hit_tokens.labels(job).inc(sum(sequence.num_tokens for sequence in hits))
        self._cache_hit_bytes.labels(job).inc(sum(sequence.num_rows for sequence in hits) * row_bytes)

    def request_done(self, job: str, outcome: str) -> None:
        """A request has been answered; `outcome` is "ok", "cancelled" or the name of an error."""
        self._requests.labels(self.job_label(job), outcome).inc()

    def sent(self, door: str, num_bytes: int) -> None:
        """So many bytes went through one of the doors that send."""
        self._sent_bytes[door] += num_bytes


class _Collector(Collector):
    def __init__(self, look: Callable[[], Gauges], metrics: Metrics) -> None:
        self._look = look
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The slab and the queue as they are now."""
        now = self._look()
        self._metrics.forget_silent({state.job for state in now.jobs if state.is_present})
        yield from job_families(_NAMESPACE, now.jobs, has_slab=True)
        slots = GaugeMetricFamily(f"{_NAMESPACE}_slots", "Slots of the slab by state.", labels=["state"])
        for state, count in now.slab.slots.items():
            slots.add_metric([state], count)
        yield slots
        for name, text, value in (
            ("sessions", "Open sessions.", len(now.slab.sessions)),
            ("orphans", "Replaced slots that a silent client may still map.", now.slab.orphans),
            ("slab_bytes", "Shared memory of slots, orphans and heads.", _slab_bytes(now.slab)),
            ("waiting_tokens", "Tokens of requests that have not started.", now.waiting_tokens),
            ("waiting_requests", "Requests that have not started.", now.waiting_requests),
            ("engine_tokens_per_second", "What the engine computes lately while it works.", now.engine_tokens_per_s),
            ("weight_version", "Number of the weights that are served.", now.weight_version),
        ):
            yield GaugeMetricFamily(f"{_NAMESPACE}_{name}", text, value=value)
        yield from served_families(
            _NAMESPACE, model=now.model, weights_updated_at_s=now.weights_updated_at_s, asleep=now.asleep
        )
        if now.cache is not None:
            yield from _cache(now.cache)
        counters = now.slab.counters
        door = CounterMetricFamily(f"{_NAMESPACE}_bytes", "Bytes that clients got, by door.", labels=["door"])
        door.add_metric(["shm"], counters.claimed_bytes)
        for name, num_bytes in self._metrics.sent_bytes.items():
            door.add_metric([name], num_bytes)
        yield door
        for name, text, value in (
            ("cached_tokens", "Tokens that the engine had computed before, and did not again.", now.cached_tokens),
            ("handles_mapped", "Handles claimed through shared memory.", counters.claimed),
            ("handles_streamed", "Reads of handles through the stream door.", counters.streamed),
            ("handles_unclaimed", "Answers that nobody claimed in time.", counters.unclaimed),
            ("slots_abandoned", "Times a slot went out of service under a silent client.", counters.abandoned),
            ("sessions_opened", "Sessions opened.", counters.sessions_opened),
            ("leases_expired", "Sessions that ended by silence.", counters.sessions_expired),
            ("sessions_died", "Sessions that ended with their process.", counters.sessions_died),
        ):
            yield CounterMetricFamily(f"{_NAMESPACE}_{name}", text, value=value)


def _slab_bytes(slab: Snapshot) -> int:
    return (sum(slab.slots.values()) + slab.orphans) * slab.slot_bytes + slab.shared_bytes


def _cache(cache: CacheState) -> Iterator[Metric]:
    tiers = {"memory": cache.memory, "directory": cache.directory}
    present = {name: tier for name, tier in tiers.items() if tier is not None}
    yield _by_tier(GaugeMetricFamily, "cache_bytes", "Bytes that rows take.", present, lambda tier: tier.used_bytes)
    yield _by_tier(GaugeMetricFamily, "cache_entries", "Sequences kept.", present, lambda tier: tier.entries)
    yield _by_tier(
        CounterMetricFamily,
        "cache_evictions",
        "Sequences that made room for others.",
        present,
        lambda tier: tier.evicted,
    )
    yield CounterMetricFamily(f"{_NAMESPACE}_cache_corrupt", "Entries that were damaged.", value=cache.corrupt)
    yield CounterMetricFamily(f"{_NAMESPACE}_cache_skipped", "Entries that were not written.", value=cache.skipped)
    yield GaugeMetricFamily(f"{_NAMESPACE}_cache_writes", "Whether files are written.", value=not cache.refusal)


def _by_tier(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    tiers: Mapping[str, TierState],
    value: Callable[[TierState], int],
) -> Metric:
    metric = family(f"{_NAMESPACE}_{name}", text, labels=["tier"])
    for tier, state in tiers.items():
        metric.add_metric([tier], value(state))
    return metric
