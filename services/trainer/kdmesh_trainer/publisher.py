"""Brings the student, as it learns, to the servers that sample from it, or that teach it."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdmesh.errors import ConfigError, KdmeshError, ModelMismatch
from kdmesh.models.element_types import element_types
from kdmesh.models.placement import DTYPES
from kdmesh.rpc.weights.services import ServedWeights
from kdmesh.types import DType
from kdmesh.weights.manifest import BASE_BYTES, AdapterSpec, LowRankSpec, TensorSpec, UpdatePolicy
from kdmesh.weights.packing import Changes, Weights
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.stop import losing_the_step
from kdmesh_trainer.student.lora import LowRank
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.weights import StudentWeight, whole, without_aliases
from kdmesh_trainer.teacher_copy import TeacherCopy

log = logging.getLogger(__name__)

_DONE = -1


class Sender(Protocol):
    """Who carries the bytes; a kdmesh.rpc.weights.sender.WeightSender is one."""

    def describe(self) -> tuple[ServedWeights, ...]:
        """What each server serves now. Blocks."""
        ...

    def outdated(self, version: int, *, among: Collection[str] = ()) -> frozenset[str]:
        """Addresses of the servers, those `among` included, that answer now, and serve an older version.

        Blocks, shortly.
        """
        ...

    def publish(
        self,
        version: int,
        architecture_fingerprint: str,
        tensors: Weights,
        policy: UpdatePolicy,
        changes: Changes | None = None,
        *,
        to: Collection[str] | None = None,
        needed: int | None = None,
    ) -> frozenset[str]:
        """Return when `needed` of the servers `to` serve this version; who was left behind. Blocks."""
        ...


@dataclass(frozen=True, slots=True)
class _Sent:
    """A tensor that is sent, and what makes it on every rank together."""

    spec: TensorSpec
    make: Callable[[], Tensor]


class StudentPublisher:
    """Sends every weight under its Hugging Face name and in the servers' own element type; tied weights once.

    What transformers keeps in float32 in a model of that type, as routers of mixtures, is sent in float32.
    Of a student with an adapter the base travels once, and then the adapter, which servers add up. Where their element
    type cannot hold the base exactly, or the adapter is more than a sum, they get whole matrices, as if there were no
    adapter. Ranks gather one tensor at a time, as
    the first of them sends it, and so never hold a second copy of the student.
    """

    def __init__(
        self,
        student: Student,
        sender: Sender | None,
        *,
        policy: UpdatePolicy,
        mesh: Mesh,
        weights: Mapping[str, StudentWeight] | None = None,
        needed: int | None = None,
        come_and_go: bool = False,
    ) -> None:
        """
        Args:
            student: sharded.
            sender: on the first rank; None on the others.
            policy: what becomes of samples under way.
            weights: what is sent in place of the student's own, under the same names; None: the student's own.
            needed: how many servers must take each version, the others being left behind if they are not there; None:
                all of them.
            come_and_go: servers may come later that have served another job.

        Raises:
            ConfigError: a tensor of the student is not of floating point, so that it cannot be sent.
        """
        assert (sender is not None) == mesh.is_first
        self._student = student
        self._sender = sender
        self._policy = policy
        self._needed = needed
        self._come_and_go = come_and_go
        self._mesh = mesh
        self._fingerprint = student.architecture_fingerprint()
        self._weights_by_name = without_aliases(student.weights()) if weights is None else weights
        self._steps_done: int | None = None  # of the student that was published last
        self._weight_version = 0
        self._behind: frozenset[str] = frozenset()
        self._dtype: DType | None = None  # of the servers, once they have been looked at
        self._sent: tuple[_Sent, ...] = ()
        self._adapter: AdapterSpec | None = None  # whose factors are the last of what is sent
        for name, weight in self._weights_by_name.items():
            if not weight.is_floating_point:
                raise ConfigError(f"the student's {name} is {weight.base.dtype}; servers take floating point only")

    def publish(self, *, version: int) -> None:
        """Have every server that is there serve the student as it is now, after `version` steps. Collective.

        Each time under a new and higher number, so the same may be published again. `behind` names the servers that
        were not there, and not needed.

        Raises:
            StepLost: a server that is needed refuses it, or does not take it in time; on every rank.
            NotFinite, ConfigError: as WeightSender.publish says; on every rank.
        """
        release(self._student)
        if self._dtype is None:
            with losing_the_step():
                self._dtype = self._mesh.on_first(self._look_at_servers)
            self._decide(self._dtype)
        self._weight_version = self._mesh.on_first(lambda: self._weight_version + 1)
        self._bring(to=None, needed=self._needed)
        self._steps_done = version
        log.info("weights published", extra={"steps_done": version, "weight_version": self._weight_version})

    def catch_up(self, among: Collection[str]) -> None:
        """Bring what was published last, which the student must still be, to servers that lack it. Collective.

        Args:
            among: addresses of servers that were found to lack it, of which the sender may not know yet.

        Raises:
            StepLost: a server refuses it; on every rank.
            NotFinite, ConfigError: as WeightSender.publish says; on every rank.
        """
        release(self._student)
        outdated = self._mesh.on_first(lambda: self._look_for_outdated(among))
        self._bring(to=outdated, needed=0)
        log.info("weights published again", extra={"to": sorted(outdated), "weight_version": self._weight_version})

    @property
    def behind(self) -> frozenset[str]:
        """Addresses of servers that were not there when they were to get what was published last."""
        return self._behind

    def weight_version(self, version: int) -> int:
        """The number that servers know the student by which was published last, after `version` steps."""
        assert version == self._steps_done
        return self._weight_version

    # On the first rank

    def _look_at_servers(self) -> DType:
        """Their element type. Numbers go on from the highest that any of them knows."""
        assert self._sender is not None
        served = self._sender.describe()
        if len({weights.dtype for weights in served}) > 1:
            differing = ", ".join(f"{weights.dtype} at {weights.address}" for weights in served)
            raise ModelMismatch(f"the servers' weights have several element types: {differing}")
        self._weight_version = max(weights.version for weights in served)
        if self._come_and_go:
            # What another job has left on a server that comes later must have a lower number, so that it is neither
            # taken for this job's nor in the way of it. No job publishes once in a millisecond.
            self._weight_version = max(self._weight_version, time.time_ns() // 10**6)
        return served[0].dtype

    def _look_for_outdated(self, among: Collection[str]) -> frozenset[str]:
        assert self._sender is not None
        return self._sender.outdated(self._weight_version, among=among)

    def _send(self, to: Collection[str] | None, needed: int | None) -> frozenset[str] | KdmeshError:
        """Who was left behind, or what kept a server from taking it."""
        assert self._sender is not None
        try:
            tensors, changes = self._announced()
            return self._sender.publish(
                self._weight_version, self._fingerprint, tensors, self._policy, changes, to=to, needed=needed
            )
        except KdmeshError as error:
            return error
        finally:
            self._mesh.on_first(lambda: _DONE)

    def _announced(self) -> tuple[Weights, Changes | None]:
        """What is sent, with what gathers it."""
        made = [(sent.spec, functools.partial(self._gather_for_all, index)) for index, sent in enumerate(self._sent)]
        if self._adapter is None:
            return made, None
        count = len(self._weights_by_name)
        return made[:count], Changes(adapter=self._adapter, factors=made[count:])

    def _gather_for_all(self, index: int) -> Tensor:
        return self._gather(self._mesh.on_first(lambda: index))

    # On every rank

    def _decide(self, dtype: DType) -> None:
        """What is sent from now on. Collective."""
        adapted = {name: weight for name, weight in self._weights_by_name.items() if weight.added is not None}
        types = element_types(self._student.lm, self._weights_by_name, getattr(torch, dtype.value))
        is_apart = bool(adapted) and not self._mesh.is_any(not all(_is_sum(w, types[n]) for n, w in adapted.items()))
        self._sent = tuple(
            _Sent(
                TensorSpec(name=name, shape=weight.shape, dtype=DTYPES[types[name]]),
                functools.partial(weight.whole_base, types[name])
                if is_apart
                else functools.partial(weight.whole, types[name]),
            )
            for name, weight in self._weights_by_name.items()
        )
        if is_apart:
            self._keep_apart({name: weight.added for name, weight in adapted.items() if weight.added is not None})

    def _keep_apart(self, added: Mapping[str, LowRank]) -> None:
        changes = {
            name: LowRankSpec(tensor=name, rank=each.a.shape[0], scaling=each.scaling) for name, each in added.items()
        }
        self._adapter = AdapterSpec(base=secrets.token_bytes(BASE_BYTES), changes=tuple(changes.values()))
        for name, each in added.items():
            specs = changes[name].factors((each.b.shape[0], each.a.shape[1]))
            self._sent += tuple(
                _Sent(spec, functools.partial(whole, factor, torch.float32))
                for spec, factor in zip(specs, (each.a, each.b), strict=True)
            )

    def _bring(self, *, to: frozenset[str] | None, needed: int | None) -> None:
        """Send the student. Collective."""
        outcome: frozenset[str] | KdmeshError = frozenset()
        if self._mesh.is_first:
            outcome = self._send(to, needed)
        else:
            self._follow()
        with losing_the_step():  # the student is whole
            left = self._mesh.on_first(lambda: _agreed(outcome))
        tried = self._behind if to is None else to
        self._behind = left | (self._behind - tried)

    def _follow(self) -> None:
        """Gather what the first rank sends, as often as it sends it. Collective, with its `_send`."""
        while (index := self._mesh.on_first(lambda: _DONE)) != _DONE:
            self._gather(index)

    def _gather(self, index: int) -> Tensor:
        """A whole tensor as it is sent. Collective."""
        return self._sent[index].make()


def _is_sum(weight: StudentWeight, dtype: torch.dtype) -> bool:
    """Whether a matrix is what servers make of its base, which they hold in `dtype`, and two factors."""
    return weight.added is not None and weight.added.magnitude is None and weight.is_exact_in(dtype)


class FollowedTeacher(Protocol):
    """Where a teacher's rows come from, when its weights change."""

    def follow(self, weight_version: int) -> None:
        """Ask for rows of these weights from now on."""
        ...


class TeacherPublisher:
    """A Publisher that gives the teacher new weights when its copy changes.

    Between two updates the teacher stays as it is. Nothing may be asked of it across one: see RowQueue.
    """

    def __init__(self, copy: TeacherCopy, publisher: StudentPublisher, teacher: FollowedTeacher) -> None:
        """
        Args:
            copy: what the teacher is to have.
            publisher: sends the copy's weights.
            teacher: to be told of their number.
        """
        self._copy = copy
        self._publisher = publisher
        self._teacher = teacher
        self._steps_done: int | None = None

    def publish(self, *, version: int) -> None:
        """The student has done `version` steps; bring its teacher to where it must be. Collective.

        The first call sends the copy as it is: the teacher may have been started anew, or have seen later steps.

        Raises:
            StepLost: a server that is needed refuses it, or does not take it in time; on every rank.
            NotFinite, ConfigError: as WeightSender.publish says; on every rank.
        """
        before, self._steps_done = self._steps_done, version
        assert before is None or version == before + 1
        if before is None or self._copy.advance(version):
            self._publisher.publish(version=version)
            self._teacher.follow(self._publisher.weight_version(version))


def _agreed(outcome: frozenset[str] | KdmeshError) -> frozenset[str]:
    if isinstance(outcome, KdmeshError):
        raise outcome
    return outcome
