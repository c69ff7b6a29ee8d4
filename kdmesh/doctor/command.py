"""`kdmesh doctor`: looks at a machine or a cluster, and says what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from kdmesh.doctor.finding import Finding, Part
from kdmesh.outputs import show

_MISSING = 1
_STYLES = {"ok": "green", "missing": "red", "worse": "yellow", "unknown": "dim"}


@click.command()
@click.option("--on", "context", metavar="CONTEXT", help="Look at the cluster of this context of your kubeconfig.")
@click.option("--cluster", "is_cluster", is_flag=True, help="Look at the cluster of its current context.")
@click.option("-n", "--namespace", help="Namespace in the cluster.  [default: the context's]")
@click.option(
    "--need",
    "needs",
    multiple=True,
    type=click.Choice(get_args(Part)),
    help="You cannot do without; as often as you like.",
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path),
    help="Where servers put their socket, as `server.runtime_dir`.  [default: a temporary directory]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def doctor(
    context: str | None,
    is_cluster: bool,
    namespace: str | None,
    needs: tuple[Part, ...],
    runtime_dir: Path | None,
    as_json: bool,
) -> None:
    """Look whether this machine, or a Kubernetes cluster, has what kdmesh needs, and say what each miss costs.

    Kernel features are tried out, not read from a version. Exit code 0 when nothing is missing that is needed, 1
    otherwise; what only makes things worse is told and does not count, unless --need names it.

    \b
    Example: kdmesh doctor --need gpu
    """
    wants_cluster = is_cluster or context is not None or namespace is not None
    looked = _of_cluster(context, namespace) if wants_cluster else _of_machine(runtime_dir)
    findings = [finding.needed() if finding.part in needs else finding for finding in looked]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        _show(findings)
    if any(finding.verdict == "missing" for finding in findings):
        sys.exit(_MISSING)


def _of_machine(runtime_dir: Path | None) -> Iterator[Finding]:
    # Not at the top: torch is among what is loaded to look at it.
    from kdmesh.doctor.devices import devices
    from kdmesh.doctor.kernel import kernel
    from kdmesh.doctor.limits import limits
    from kdmesh.doctor.software import software

    yield from kernel(runtime_dir)
    yield from limits()
    yield from devices()
    yield from software()


def _of_cluster(context: str | None, namespace: str | None) -> Iterator[Finding]:
    from kdmesh.cluster.client import Cluster
    from kdmesh.doctor.cluster import cluster_findings

    with closing(Cluster(context, namespace)) as cluster:
        yield from cluster_findings(cluster)


def _show(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.verdict, style=_STYLES[finding.verdict]), finding.name, Text(finding.found))
        for word, text in (("costs", finding.cost), ("cure", finding.cure)):
            if text:
                table.add_row("", "", Text(f"{word}: {text}", style="dim"))
    missing = [finding.name for finding in findings if finding.verdict == "missing"]
    worse = [finding.name for finding in findings if finding.verdict == "worse"]
    told = [f"\nMissing: {', '.join(missing)}." if missing else "\nNothing is missing that is needed."]
    if worse:
        told.append(f"Worse than it could be: {', '.join(worse)}.")
    show(table, *told, width=160)
