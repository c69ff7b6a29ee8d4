"""What a node of a training job says, over its restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from kdmesh.cluster.client import Cluster
from kdmesh.cluster.jobs import Pod, find_job, find_pods, wait_for_pods
from kdmesh.cluster.refusals import Forbidden, Missing
from kdmesh.errors import ClusterError


def lines(cluster: Cluster, name: str, *, node: int, tail: int | None) -> Iterator[str]:
    """What the newest attempt of a node has said so far. Raises ClusterError where it has not begun."""
    pods = _of(cluster, name, node)
    started = [pod for pod in pods if pod.has_started]
    if not started:
        job = find_job(cluster, name)
        why = pods[-1].reason or pods[-1].phase if pods else "it has no pod"
        raise ClusterError(f"node {node} of {name} has not said anything: the job is {job.state}; {why}")
    with cluster.log(started[-1].name, follow=False, tail=tail) as said:
        yield from said


def followed(cluster: Cluster, name: str, *, node: int, tail: int | None, warn: Callable[[str], None]) -> Iterator[str]:
    """What a node says, until its job is over or gone; goes on with the next attempt when one ends.

    Args:
        warn: is told why a log cannot be read, as when its machine is lost; once for each attempt.
    """
    find_job(cluster, name)
    told: dict[str, datetime | None] = {}
    done: set[str] = set()
    unread: set[str] = set()
    while True:
        pod = next((pod for pod in _of(cluster, name, node) if pod.name not in done and pod.has_started), None)
        if pod is not None:
            before = told.get(pod.name)
            try:
                yield from _rest(cluster, pod.name, told, tail=tail)
            except Forbidden:
                raise
            except ClusterError as error:
                if pod.name not in unread:
                    warn(str(error))
                unread.add(pod.name)
            if not _runs(cluster, name, node, pod.name):  # else the connection was cut
                done.add(pod.name)
            elif told.get(pod.name) == before:  # nothing came of it
                wait_for_pods(cluster, name)
        elif _is_over(cluster, name):
            return
        else:
            wait_for_pods(cluster, name)


def _rest(cluster: Cluster, pod: str, told: dict[str, datetime | None], *, tail: int | None) -> Iterator[str]:
    """The lines after those that were told, by their times: counted they cannot be, once the machine began a new file.

    Args:
        told: when the last line of each pod that was told was written; None before the first.
        tail: how many of the first pod that is looked at were said before; None for all.
    """
    since = told.setdefault(pod, None)
    is_first = since is None and len(told) == 1
    try:
        with cluster.log(pod, follow=True, tail=tail if is_first else None, timestamps=True) as said:
            for line in said:
                written, text = _dated(line)
                if since is None or written is None or written > since:
                    told[pod] = written or told[pod]
                    yield text
    except Missing:  # removed meanwhile
        return


def _dated(line: str) -> tuple[datetime | None, str]:
    """When it was written, and what; None for what the machine says of itself, as that there is no log."""
    stamp, _, text = line.partition(" ")
    try:
        return datetime.fromisoformat(stamp), text
    except ValueError:
        return None, line


def _of(cluster: Cluster, name: str, node: int) -> list[Pod]:
    return [pod for pod in find_pods(cluster, name) if pod.node == node]


def _runs(cluster: Cluster, name: str, node: int, pod: str) -> bool:
    return any(one.phase == "Running" for one in _of(cluster, name, node) if one.name == pod)


def _is_over(cluster: Cluster, name: str) -> bool:
    try:
        return find_job(cluster, name).is_over
    except Missing:
        return True
