"""The commands of `kdmesh` that speak to a Kubernetes cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml

from kdmesh.cluster.plan import JobKind
from kdmesh.commands import submission
from kdmesh.commands.config_option import config_argument, set_option
from kdmesh.outputs import show
from kdmesh.plain_yaml import Dumper

if TYPE_CHECKING:
    from kdmesh.cluster.client import Cluster

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = ["Job", "JobSet", "TrainJob"]
_EVENTS = 10
_show = partial(show, width=200, wraps=False)


def _cluster_options(command: F) -> F:
    """Which cluster, and where in it."""
    on = click.option("--on", "context", metavar="CONTEXT", help="Context of your kubeconfig.  [default: its current]")
    namespace = click.option("-n", "--namespace", help="Namespace in the cluster.  [default: the context's]")
    return on(namespace(command))


@click.command()
@config_argument
@set_option
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of the job.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="GPUs of each; a rank on each.")
@click.option(
    "--image",
    required=True,
    envvar="KDMESH_TRAINER_IMAGE",
    show_envvar=True,
    help="Image with kdmesh and what the configuration imports.",
)
@click.option("--name", help="Of the job.  [default: that of the directory in `output`]")
@click.option("--queue", help="Local queue of Kueue that the job waits in.")
@click.option("--kind", type=click.Choice(_KINDS), help="What to make.  [default: by --nodes and what the cluster has]")
@click.option("--cpus", help="CPUs of each node.  [default: 4 for each rank]")
@click.option("--memory", help="Memory of each node.  [default: 32Gi for each rank]")
@click.option("--gpu-resource", default="nvidia.com/gpu", show_default=True, help="What the cluster calls its GPUs.")
@click.option(
    "--resource", "resources", multiple=True, metavar="NAME=AMOUNT", help="More of each node, as rdma/ib=1 is."
)
@click.option("--claim", help="Existing PersistentVolumeClaim for the output.  [default: one is made]")
@click.option("--storage", help="Size of the claim that is made.  [default: 100Gi]")
@click.option("--storage-class", help="Class of the claim that is made.  [default: the cluster's]")
@click.option(
    "--volume", "volumes", multiple=True, metavar="CLAIM:/PATH[:rw]", help="Mount a claim with models or data."
)
@click.option("--secret", "secrets", multiple=True, metavar="SECRET:/PATH", help="Mount a secret's files, as a token.")
@click.option("--secret-env", "secret_variables", multiple=True, metavar="NAME=SECRET/KEY", help="Variable by secret.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Variable of every node.")
@click.option("--in-image", multiple=True, metavar="/PATH", help="Directory whose files the image holds.")
@click.option("--node-label", "node_labels", multiple=True, metavar="NAME=VALUE", help="Take only such machines.")
@click.option(
    "--tolerate", "tolerated", multiple=True, metavar="KEY[=VALUE][:EFFECT]", help="Take machines with such a taint."
)
@click.option("--service-account", help="That the job runs as.")
@click.option("--pull-secret", help="Secret to fetch the image with.")
@click.option("--retries", type=click.IntRange(min=0), default=3, show_default=True, help="Restarts after failures.")
@click.option(
    "--grace-s",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Seconds to write a checkpoint in when the job is stopped or preempted.",
)
@click.option("--user", type=int, default=10001, show_default=True, help="Number of the user that it runs as.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the manifests and send nothing; of several nodes without --kind, the cluster is asked for the kind.",
)
@_cluster_options
def submit(
    config: Path,
    overrides: tuple[str, ...],
    kind: JobKind | None,
    dry_run: bool,
    context: str | None,
    namespace: str | None,
    **wishes: Any,
) -> None:
    """Train in a Kubernetes cluster, as CONFIG says.

    Makes a TrainJob or JobSet where the cluster has them, or a plain Job for one node; the configuration travels as a
    ConfigMap. Relative paths in it start in a claim that is made for the output and stays when the job is gone. A job
    that is preempted goes on from its last checkpoint, and that does not count as a retry.

    \b
    Example: kdmesh submit my.yaml --nodes 2 --gpus 8 --queue research --image registry.example/kdmesh-trainer:1 \\
               --volume models:/models --volume data:/data
    """
    from kdmesh.cluster.manifests import manifests
    from kdmesh.cluster.submit import choose_kind
    from kdmesh.cluster.submit import submit as send

    wanted = submission.Wishes(**wishes)
    # Before anybody is asked: what the cluster has does not matter to a configuration that is wrong.
    submission.plan(config, overrides, wanted, kind or ("Job" if wanted.nodes == 1 else "JobSet"))
    if dry_run and (kind is not None or wanted.nodes == 1):
        _print_manifests(manifests(submission.plan(config, overrides, wanted, kind or "Job")).all())
        return
    with _cluster(context, namespace) as cluster:
        made = manifests(submission.plan(config, overrides, wanted, kind or choose_kind(cluster, nodes=wanted.nodes)))
        if dry_run:
            _print_manifests(made.all())
            return
        done = send(cluster, made)
    continued = f"; the claim {done.continued_claim} is there already, and is continued" if done.continued_claim else ""
    click.echo(f"{done.kind} {done.name} is in namespace {done.namespace}{continued}")
    click.echo(f"Watch it: kdmesh logs -f {done.name}{_where(context, namespace)}")


@click.command("jobs")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@_cluster_options
def jobs_command(everywhere: bool, as_json: bool, context: str | None, namespace: str | None) -> None:
    """List the training jobs of a cluster that `kdmesh submit` made, the newest first.

    \b
    Example: kdmesh jobs --on production
    """
    from kdmesh.cluster import tables
    from kdmesh.cluster.jobs import find_jobs

    with _cluster(context, namespace) as cluster:
        jobs = find_jobs(cluster, everywhere=everywhere)
        where = "any namespace" if everywhere else f"namespace {cluster.namespace}"
    if as_json:
        click.echo(json.dumps([asdict(job) for job in jobs]))
    elif jobs:
        _show(tables.jobs_table(jobs, with_namespaces=everywhere))
    else:
        click.echo(f"There is no job in {where}.")


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on, over restarts, until the job is over.")
@click.option("--node", type=click.IntRange(min=0), default=0, show_default=True, help="Which of its nodes.")
@click.option("--tail", type=click.IntRange(min=0), help="Only so many lines of what was said before.")
@_cluster_options
def logs(name: str, follow: bool, node: int, tail: int | None, context: str | None, namespace: str | None) -> None:
    """Print what the job NAME says; its first node speaks for all but for errors.

    \b
    Example: kdmesh logs -f my-student
    """
    from kdmesh.cluster import logs as reading

    with _cluster(context, namespace) as cluster:
        if follow:
            said = reading.followed(cluster, name, node=node, tail=tail, warn=partial(click.echo, err=True))
        else:
            said = reading.lines(cluster, name, node=node, tail=tail)
        for line in said:
            click.echo(line)


@click.command()
@click.argument("name")
@click.option("--wait", "is_awaited", is_flag=True, help="Return only when none of its pods runs any more.")
@_cluster_options
def cancel(name: str, is_awaited: bool, context: str | None, namespace: str | None) -> None:
    """End the job NAME: its current step is finished, and a checkpoint written. The claim with its output stays.

    \b
    Example: kdmesh cancel my-student
    """
    from kdmesh.cluster import jobs

    with _cluster(context, namespace) as cluster:
        job = jobs.cancel(cluster, name)
        if is_awaited:
            jobs.wait_for_pods_to_end(cluster, name)
    end = "has ended" if is_awaited else "ends"
    if job is None:
        click.echo(f"What was left of {name} {end}.")
        return
    click.echo(f"{job.kind} {name} {end}; {job.output} on the claim {job.claim} stays.")


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_cluster_options
def describe(name: str, as_json: bool, context: str | None, namespace: str | None) -> None:
    """Say all that the cluster knows of the job NAME: its state, its pods, why they wait, what happened last.

    \b
    Example: kdmesh describe my-student
    """
    from kdmesh.cluster import jobs, tables
    from kdmesh.cluster.events import find_events

    with _cluster(context, namespace) as cluster:
        job = jobs.find_job(cluster, name)
        pods = jobs.find_pods(cluster, name)
        said = jobs.conditions(cluster, name)
        events = find_events(cluster, name)[-_EVENTS:]
    if as_json:
        parts = {"pods": [asdict(pod) for pod in pods], "conditions": said, "events": [asdict(one) for one in events]}
        click.echo(json.dumps({**asdict(job), **parts}))
        return
    _show(*tables.summary(job), *tables.indented(said))
    if pods:
        _show("", tables.pods_table(pods))
    if events:
        _show("", *(event.sentence(tables.age(event.last)) for event in events))


COMMANDS = (submit, jobs_command, logs, cancel, describe)


@contextmanager
def _cluster(context: str | None, namespace: str | None) -> Iterator[Cluster]:
    # Not at the top: the package takes long to load, and other commands do not need it.
    from kdmesh.cluster.client import Cluster

    with closing(Cluster(context, namespace)) as cluster:
        yield cluster


class _Dumper(Dumper):
    """Writes text of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _print_manifests(found: list[dict[str, Any]]) -> None:
    text: str = yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    click.echo(text.rstrip())


def _where(context: str | None, namespace: str | None) -> str:
    """The options that lead to the same place."""
    return f"{f' --on {context}' if context else ''}{f' --namespace {namespace}' if namespace else ''}"
