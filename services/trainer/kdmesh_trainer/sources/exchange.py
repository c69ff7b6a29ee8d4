"""Brings together what the ranks have sampled, also when a server has lost its weights meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TypeAlias

from kdmesh.errors import KdmeshError, ModelMismatch
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.sources.shares import Share
from kdmesh_trainer.stop import StepLost

log = logging.getLogger(__name__)

# A server that is started anew has old weights once; one that has them again and again is not ours.
_MOST_REFUSALS = 3

BringAgain: TypeAlias = Callable[[Collection[str]], None]
"""Called with the addresses of servers that were found to lack weights; the same on every rank."""


def exchange(sampler: Sampler, step: int, *, what: str, mesh: Mesh, bring_again: BringAgain) -> list[Share]:
    """The share of every rank, all of them whole. Collective.

    Args:
        what: is sampled, for errors.
        bring_again: brings servers the weights that they lack, and tells `sampler`. Collective.

    Raises:
        ModelMismatch: servers refuse although they got the weights again.
        StepLost: the samples of a rank will not come, or cannot be used.
    """
    num_refused = 0
    while True:
        shares = _whole_or_lost(mesh.gather(_collected(sampler, step)))
        if all(share.is_whole for share in shares):
            return shares
        refusals = [share.refusal for share in shares if share.refusal]
        num_refused += bool(refusals)
        if num_refused > _MOST_REFUSALS:
            break
        why = refusals[0] if refusals else "it came back"
        log.warning("a rollout server has old weights, so it gets the student again", extra={"why": why})
        bring_again({address for share in shares for address in share.outdated})
        sampler.ask_again(step)
    raise ModelMismatch(f"{what} could not be sampled although the servers got the weights again: {refusals[0]}")


def _collected(sampler: Sampler, step: int) -> Share | KdmeshError:
    """What this rank has for the others; never raised here, while they wait for it."""
    try:
        return sampler.collect(step)
    except KdmeshError as error:
        return error


def _whole_or_lost(collected: list[Share | KdmeshError]) -> list[Share]:
    for each in collected:
        if isinstance(each, KdmeshError):
            raise StepLost(str(each)) from each
    return [each for each in collected if isinstance(each, Share)]
