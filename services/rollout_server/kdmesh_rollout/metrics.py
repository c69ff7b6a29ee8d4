"""The numbers that /metrics shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kdmesh.serving.jobs.families import job_families
from kdmesh.serving.jobs.metrics import JOB, JobMetrics
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.server_families import served_families
from kdmesh.types import Sample, SleepTag

_NAMESPACE = "kdmesh_rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What is true at the moment of a scrape."""

    jobs: Sequence[JobState]
    running_samples: int
    waiting_samples: int
    waiting_tokens: int
    engine_tokens_per_s: float  # 0 before the first step
    model: str
    weight_version: int
    weights_updated_at_s: float | None  # Unix time; None: they are those of the start
    drawn_tokens: int
    prefilled_tokens: int
    asleep: frozenset[SleepTag]


class Metrics(JobMetrics):
    """Counters and histograms; a job is known by the name its streams carry.

    Written and read on the event loop only.
    """

    def __init__(self) -> None:
        super().__init__(_NAMESPACE)
        self._samples = self.counter("samples", "Finished samples by why they ended.", JOB, "reason")
        self._tokens = self.counter("tokens", "Tokens of finished samples.", JOB)
        self._requests = self.counter("requests", "Requests by what came of them.", JOB, "outcome")
        self._queue_seconds = self.histogram("queue_seconds", "From arrival to a sample's first step.", JOB)
        self._step_seconds = self.histogram("step_seconds", "Duration of a step: a token, or, in SGLang, a sample.")

    def watch(self, look: Callable[[], Gauges]) -> None:
        """Show what `look` finds at every scrape; called once, when the server is ready."""
        self.registry.register(_Collector(look, self))

    def sample_started(self, job: str, *, waited_s: float) -> None:
        """A sample has begun."""
        self._queue_seconds.labels(self.job_label(job)).observe(waited_s)

    def sample_done(self, job: str, sample: Sample) -> None:
        """A sample has finished."""
        label = self.job_label(job)
        self._samples.labels(label, sample.finish_reason.value).inc()
        self._tokens.labels(label).inc(sample.num_tokens)

    def step_done(self, seconds: float) -> None:
        """The engine has made a step."""
        self._step_seconds.observe(seconds)

    def request_done(self, job: str, outcome: str) -> None:
        """A request has been answered; `outcome` is "ok", "aborted", "cancelled" or the name of an error."""
        self._requests.labels(self.job_label(job), outcome).inc()


class _Collector(Collector):
    def __init__(self, look: Callable[[], Gauges], metrics: Metrics) -> None:
        self._look = look
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The engine and the queue as they are now."""
        now = self._look()
        self._metrics.forget_silent({state.job for state in now.jobs if state.is_present})
        yield from job_families(_NAMESPACE, now.jobs, has_slab=False)
        for name, text, value in (
            ("running_samples", "Samples being decoded.", now.running_samples),
            ("waiting_samples", "Samples that have not started.", now.waiting_samples),
            ("waiting_tokens", "Tokens of prompts, and of the longest responses, that wait.", now.waiting_tokens),
            ("engine_tokens_per_second", "What the engine draws lately while it works.", now.engine_tokens_per_s),
            ("weight_version", "Weights that are served; 0 for those of the start.", now.weight_version),
        ):
            yield GaugeMetricFamily(f"{_NAMESPACE}_{name}", text, value=value)
        yield from served_families(
            _NAMESPACE, model=now.model, weights_updated_at_s=now.weights_updated_at_s, asleep=now.asleep
        )
        for name, text, value in (
            ("drawn_tokens", "Tokens drawn, those of aborted samples too.", now.drawn_tokens),
            ("prefilled_tokens", "Prompt tokens computed.", now.prefilled_tokens),
        ):
            yield CounterMetricFamily(f"{_NAMESPACE}_{name}", text, value=value)
