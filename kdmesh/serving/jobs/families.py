"""What /metrics says of jobs as they are at the moment of a scrape."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kdmesh.serving.jobs.metrics import JOB, MAX_JOBS, OTHERS, UNNAMED
from kdmesh.serving.jobs.state import JobState


def job_families(namespace: str, states: Sequence[JobState], *, has_slab: bool) -> Iterator[Metric]:
    """What jobs wait for, hold and were refused; those that are too many are added up."""
    by_label = defaultdict[str, list[JobState]](list)
    for state in sorted(states, key=lambda state: not state.is_present):
        by_label[(state.job or UNNAMED) if len(by_label) < MAX_JOBS else OTHERS].append(state)
    waiting = _gauge(namespace, "waiting_tokens", "Tokens of the job's requests that have not started.")
    in_flight = _gauge(namespace, "tokens_in_flight", "Tokens that the engine computes for the job.")
    slab = _gauge(namespace, "slab_bytes", "Bytes of the slots that the job holds.")
    leases = _gauge(namespace, "leases", "Sessions of the job that are open.")
    abandoned = CounterMetricFamily(
        f"{namespace}_job_slots_abandoned", "Times a slot went out of service under the job.", labels=[JOB]
    )
    refusals = CounterMetricFamily(
        f"{namespace}_job_refusals",
        "Requests of the job that waited in vain or were not let in, by what was short.",
        labels=[JOB, "reason"],
    )
    for name, those in by_label.items():
        waiting.add_metric([name], sum(state.waiting_tokens for state in those))
        in_flight.add_metric([name], sum(state.tokens_in_flight for state in those))
        slab.add_metric([name], sum(state.slab_bytes for state in those))
        leases.add_metric([name], sum(state.sessions for state in those))
        abandoned.add_metric([name], sum(state.abandoned_slots for state in those))
        reasons = Counter[str]()
        for state in those:
            reasons.update(state.refusals)
        for reason, count in reasons.items():
            refusals.add_metric([name, reason], count)
    yield from (waiting, in_flight, refusals)
    if has_slab:
        yield from (slab, leases, abandoned)


def _gauge(namespace: str, name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{namespace}_job_{name}", text, labels=[JOB])
