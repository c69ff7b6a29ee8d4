"""Jobs of a cluster as tables and paragraphs, for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from kdmesh.cluster.jobs import Job, Pod

_STYLES = {"failed": "red", "running": "green", "finished": "dim"}


def jobs_table(jobs: Sequence[Job], *, with_namespaces: bool) -> Table:
    """One line each."""
    headings = ["name", "kind", "state", "nodes", "gpus", "restarts", "queue", "age"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ["namespace", *headings] if with_namespaces else headings:
        table.add_column(heading, no_wrap=True)
    for job in jobs:
        cells: list[str | Text] = [
            job.name,
            job.kind,
            Text(job.state, style=_STYLES.get(job.state, "")),
            str(job.nodes),
            str(job.nodes * job.gpus_per_node),
            "-" if job.restarts is None else str(job.restarts),
            job.queue or "-",
            age(job.created),
        ]
        table.add_row(*([job.namespace, *cells] if with_namespaces else cells))
    return table


def pods_table(pods: Sequence[Pod]) -> Table:
    """One line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("node", "pod", "machine", "phase", "age", "reason"):
        table.add_column(heading, overflow="fold")
    for pod in pods:
        table.add_row(str(pod.node), pod.name, pod.machine or "-", pod.phase, age(pod.created), pod.reason)
    return table


def summary(job: Job) -> list[str]:
    """What a job is, a line each."""
    devices = f" of {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
    nodes = "1 node" if job.nodes == 1 else f"{job.nodes} nodes"
    lines = [
        f"{job.kind} {job.name} in namespace {job.namespace}: {job.state}{f', {job.reason}' if job.reason else ''}",
        f"  {nodes}{devices}, made {age(job.created)} ago",
        f"  output: {job.output} on the claim {job.claim}",
    ]
    if job.queue is not None:
        lines.append(f"  queue: {job.queue}")
    if job.restarts is not None:
        lines.append(f"  restarts: {job.restarts}")
    return lines


def indented(lines: Iterable[str]) -> list[str]:
    """As parts of a paragraph."""
    return [f"  {line}" for line in lines]


def age(created: str) -> str:
    """Since then: 12 s, 5 min, 3 h, 2 d."""
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
