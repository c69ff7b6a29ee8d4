"""Who has a version of weights, and who has not."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kdmesh.errors import ConfigError, DeadlineExpired, InvalidRequest, KdmeshError, ModelMismatch, PermissionDenied
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.weights.link import WeightLink
from kdmesh.weights.manifest import Manifest
from kdmesh.weights.packing import Weights

log = logging.getLogger(__name__)

# Trying again would end the same way.
_FINAL = (ConfigError, InvalidRequest, ModelMismatch, PermissionDenied)


@dataclass(frozen=True, slots=True)
class Update:
    """What is sent in one pass."""

    manifest: Manifest
    tensors: Weights


class Progress:
    """Who has a version, and who has not.

    Attributes:
        version: its number.
        update: how it is sent now.
        deadline: when to give up.
        waiting: addresses of servers that are to get it.
        uncertain: those that may have it, because their answer to a commit was lost.
        attempts: rounds of connecting so far.
    """

    def __init__(
        self,
        whole: Update,
        short: Update | None,
        to: Collection[str] | None,
        deadline: Deadline,
        *,
        needed: int | None,
    ) -> None:
        """`short` is tried once, first. `needed` of those `to` must get it, the others are tried; None: all."""
        self.version = whole.manifest.version
        self.update = short or whole
        self._whole = whole
        self.deadline = deadline
        self.waiting = dict.fromkeys(to or ())
        self.uncertain: set[str] = set()
        self.attempts = 0
        self._is_for_all = to is None
        self._needed = needed
        self._settled: set[str] = set()  # they have it, or have refused it
        self._lacks_base = False  # a server that is there; it is to get the whole
        self._errors: dict[str, KdmeshError] = {}  # the last of each server
        self._refusals: list[tuple[str, KdmeshError]] = []

    @property
    def is_unfinished(self) -> bool:
        """Whether something can still be done, and must be."""
        if not self.attempts:
            return self._is_for_all or bool(self.waiting)
        return (self._is_wanting or self._lacks_base) and self.deadline.left_s > 0

    def begin_attempt(self, there: Collection[str]) -> None:
        """What did not work the first time is sent whole from then on; `there` are all servers now."""
        if self._is_for_all:
            self.waiting = dict.fromkeys(address for address in there if address not in self._settled)
        if self.attempts:
            self.update = self._whole
            self._lacks_base = False
        self.attempts += 1

    def served(self, address: str) -> None:
        """A server has it."""
        self._settle(address)

    def failed(self, address: str, error: KdmeshError) -> None:
        """A server did not take it."""
        self._errors[address] = error
        log.warning("weights not taken", extra={"address": address, "reason": str(error)})
        if not isinstance(error, _FINAL):
            return
        if self.update is self._whole:
            self._settle(address)
            self._refusals.append((address, error))
        else:
            self._lacks_base = True

    def note(self, links: Sequence[WeightLink]) -> None:
        """A pass is over; a link without a failure has committed."""
        for link in links:
            if link.failure is None:
                self._settle(link.address)
                continue
            if link.has_sent_commit:
                self.uncertain.add(link.address)
            self.failed(link.address, link.failure)

    def report(self) -> frozenset[str]:
        """Who was left behind; raise what keeps a server that is needed from serving the version, if any."""
        for address, error in self._refusals:
            raise type(error)(f"{address}: {error}")
        if self._is_wanting:
            late = "; ".join(f"{address}: {self._errors[address]}" for address in self.waiting)
            raise DeadlineExpired(
                f"version {self.version} was not taken within {self.deadline.total_s} s by {late or 'any server'}"
            )
        return frozenset(self.waiting)

    @property
    def _is_wanting(self) -> bool:
        """Whether servers that are needed have still to settle."""
        return bool(self.waiting) if self._needed is None else len(self._settled) < self._needed

    def _settle(self, address: str) -> None:
        del self.waiting[address]
        self._settled.add(address)
