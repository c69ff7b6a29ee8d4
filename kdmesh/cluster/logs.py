"""What a node of a training job says, over its restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    read: dict[str, int] = {}  # lines of each pod that were told
    done: set[str] = set()
    unread: set[str] = set()
    while True:
        pod = next((pod for pod in _of(cluster, name, node) if pod.name not in done and pod.has_started), None)
        if pod is not None:
            try:
                yield from _rest(cluster, pod.name, read, tail=tail)
            except Forbidden:
                raise
            except ClusterError as error:
                if pod.name not in unread:
                    warn(str(error))
                unread.add(pod.name)
            if not _runs(cluster, name, node, pod.name):  # else the connection was cut
                done.add(pod.name)
            elif pod.name in unread:
                wait_for_pods(cluster, name)
        elif _is_over(cluster, name):
            return
        else:
            wait_for_pods(cluster, name)


def _rest(cluster: Cluster, pod: str, read: dict[str, int], *, tail: int | None) -> Iterator[str]:
    """The lines after those that were told."""
    is_cut = tail is not None and (not read or pod in read)  # the first look, or what came after it
    skipped = 0 if is_cut else read.get(pod, 0)
    last = None if not is_cut else 0 if pod in read else tail
    read.setdefault(pod, 0)
    try:
        with cluster.log(pod, follow=True, tail=last) as said:
            for index, line in enumerate(said):
                if index >= skipped:
                    read[pod] += 1
                    yield line
    except Missing:  # removed meanwhile
        return


def _of(cluster: Cluster, name: str, node: int) -> list[Pod]:
    return [pod for pod in find_pods(cluster, name) if pod.node == node]


def _runs(cluster: Cluster, name: str, node: int, pod: str) -> bool:
    return any(one.phase == "Running" for one in _of(cluster, name, node) if one.name == pod)


def _is_over(cluster: Cluster, name: str) -> bool:
    try:
        return find_job(cluster, name).is_over
    except Missing:
        return True
