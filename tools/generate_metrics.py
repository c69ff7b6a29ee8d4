"""Generates the tables of docs/metrics.md from the services' code, or with --check says whether they are up to date."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from kdmesh.auth.certificates import ServerCertificate
from kdmesh.handles.slab.reports import Counters, SlotState, Snapshot
from kdmesh.serving.config import ListenConfig
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.security import open_security
from kdmesh.serving.server_families import ServerCollector
from kdmesh_rollout import metrics as rollout
from kdmesh_teacher import metrics as teacher
from kdmesh_teacher.cache.report import CacheState, TierState
from kdmesh_trainer.reporting.metrics import Metrics as TrainerMetrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"
_UNITS = (
    ("_timestamp_seconds", "Unix seconds"),
    ("_per_second", "tokens/s"),
    ("nats_per_token", "nats/token"),
    ("_nats", "nats"),
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
    ("tokens_in_flight", "tokens"),
    ("_tokens", "tokens"),
    ("_tokens_mean", "tokens"),
    ("_fraction", "0 to 1"),
    ("_agreement", "0 to 1"),
    ("_accuracy", "0 to 1"),
    ("_pass_at", "0 to 1"),
    ("_standard_error", "0 to 1"),
    ("_overlap", "0 to 1"),
    ("_distance", ""),
    ("_ready", "0 or 1"),
    ("_asleep", "0 or 1"),
    ("_cache_writes", "0 or 1"),
    ("_info", "1"),
    ("_door", "1"),
    ("_norm", ""),
    ("_rate", ""),
    ("_imbalance", "ratio"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric."""

    name: str  # as queries write it
    kind: str
    unit: str
    labels: tuple[str, ...]
    meaning: str

    def __str__(self) -> str:
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.name}` | {self.kind} | {self.unit} | {labels} | {self.meaning} |"


def rows(service: str) -> list[Row]:
    """Of everything that a service shows, by name."""
    registry, label_names = {"teacher": _teacher, "rollout": _rollout, "trainer": _trainer}[service]()
    return sorted(_rows(registry, label_names), key=lambda row: row.name)


def page(text: str) -> str:
    """The page with its tables as the code has them."""
    for service in ("teacher", "rollout", "trainer"):
        table = "\n".join(
            ["| metric | kind | unit | labels | what |", "|---|---|---|---|---|", *map(str, rows(service))]
        )
        begin, end = f"<!-- {service}: generated -->\n", f"<!-- {service}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{table}\n{end}{rest.split(end, 1)[1]}"
    return text


def _rows(registry: CollectorRegistry, label_names: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
    for family in registry.collect():
        labels = label_names.get(family.name)
        if labels is None:
            assert family.samples, f"{family.name} shows nothing: give the tool a state in which it does"
            labels = tuple(family.samples[0].labels)
        yield Row(
            name=f"{family.name}_total" if family.type == "counter" else family.name,
            kind=family.type,
            unit=next((unit for suffix, unit in _UNITS if family.name.endswith(suffix)), "count"),
            labels=labels,
            meaning=family.documentation.replace("|", r"\|"),
        )


class _Certificate:
    """Stands for the watched one."""

    def current(self) -> ServerCertificate:
        """Ends at the beginning of time."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        return ServerCertificate(chain=b"", key=b"", client_ca=None, expires_at_s=0.0, context=context)


def _of_any_server(namespace: str, metrics: teacher.Metrics | rollout.Metrics) -> None:
    open_security(ListenConfig(port=0, rest_port=0), metrics)
    metrics.registry.register(ServerCollector(namespace, Gate[Any](), _Certificate()))  # type: ignore[arg-type]


def _teacher() -> tuple[CollectorRegistry, Mapping[str, tuple[str, ...]]]:
    metrics, tier = teacher.Metrics(), TierState(budget_bytes=0, used_bytes=0, entries=0, evicted=0)
    _of_any_server("kdmesh_teacher", metrics)
    slab = Snapshot(
        slots=dict.fromkeys(SlotState, 0),
        slot_bytes=0,
        sessions=(),
        orphans=0,
        shared_bytes=0,
        connections=0,
        counters=Counters(),
    )
    now = teacher.Gauges(
        slab=slab,
        jobs=(_job(),),
        waiting_tokens=0,
        waiting_requests=0,
        cached_tokens=0,
        engine_tokens_per_s=0.0,
        model="",
        weight_version=0,
        weights_updated_at_s=0.0,
        cache=CacheState(memory=tier, directory=tier, corrupt=0, skipped=0, refusal=""),
        asleep=frozenset(),
    )
    metrics.watch(lambda: now)
    return metrics.registry, metrics.label_names


def _rollout() -> tuple[CollectorRegistry, Mapping[str, tuple[str, ...]]]:
    metrics = rollout.Metrics()
    _of_any_server("kdmesh_rollout", metrics)
    now = rollout.Gauges(
        jobs=(_job(),),
        running_samples=0,
        waiting_samples=0,
        waiting_tokens=0,
        engine_tokens_per_s=0.0,
        model="",
        weight_version=0,
        weights_updated_at_s=0.0,
        drawn_tokens=0,
        prefilled_tokens=0,
        asleep=frozenset(),
    )
    metrics.watch(lambda: now)
    return metrics.registry, metrics.label_names


def _trainer() -> tuple[CollectorRegistry, Mapping[str, tuple[str, ...]]]:
    metrics = TrainerMetrics("", steps=1)
    return metrics.registry, metrics.label_names


def _job() -> JobState:
    return JobState(
        job="any",
        terms={},
        is_overridden=False,
        sessions=1,
        slots=0,
        slab_bytes=0,
        abandoned_slots=0,
        waiting_requests=0,
        waiting_tokens=0,
        tokens_in_flight=0,
        tokens=0,
        tokens_per_s=0.0,
        share=0.0,
        wait_p50_s=None,
        wait_p99_s=None,
        refusals={"slots": 0},
    )


def main() -> None:
    """Generate, or check with --check."""
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("docs/metrics.md is out of date, run `make metrics`")


if __name__ == "__main__":
    main()
