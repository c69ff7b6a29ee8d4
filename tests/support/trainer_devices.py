"""Services of an on-policy run that share a device: whoever is used while it sleeps fails the test."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from kdmesh.types import EVERY_TAG, SleepTag, TokenSequence
from kdmesh_trainer.devices import ScoringEvaluator, ScoringPublisher, SharedDevices
from kdmesh_trainer.loop import Stop
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.judge import Judge
from kdmesh_trainer.stats import Scores
from kdmesh_trainer.stop import NEVER
from tests.support.trainer_on_policy import Run
from tests.support.trainer_parts import Rows
from tests.support.trainer_rollouts import FastRollouts, Ready

SCORES = Scores(
    kl_nats_per_token=1.0, cross_entropy_nats_per_token=1.0, top1_agreement=None, num_loss_tokens=1, num_sequences=1
)


class Device:
    """Where at most one kind of server may be awake.

    Attributes:
        asleep: tags that each kind has given back.
        history: what it was used for, in order.
    """

    def __init__(self) -> None:
        self.asleep: dict[str, Set[SleepTag]] = {"rollouts": frozenset(), "teachers": frozenset()}
        self.history: list[str] = []

    def use(self, kind: str, tags: Set[SleepTag] = EVERY_TAG) -> None:
        """Somebody needs these."""
        assert not self.asleep[kind] & tags, f"{kind} are used while {self.asleep[kind]} sleep"
        other = next(name for name in self.asleep if name != kind)
        assert self.asleep[other] == EVERY_TAG, f"{kind} are used while {other} are awake"
        self.history.append(kind)


class Sleepers:
    """All servers of one kind."""

    def __init__(self, device: Device, kind: str) -> None:
        self._device = device
        self._kind = kind

    def sleep(self, tags: Set[SleepTag] = EVERY_TAG) -> None:
        self._device.asleep[self._kind] = frozenset(tags)

    def wake(self, *, within_s: float | None = None) -> None:
        self._device.asleep[self._kind] = frozenset()


class _Teachers:
    """What an evaluator and a publisher need of teachers."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def evaluate(self, *, stop: Stop) -> Scores:
        self._device.use("teachers")
        return SCORES

    def publish(self, *, version: int) -> None:
        self._device.use("teachers")


def shared_losses(mesh: Mesh, *, steps: int, judge: Judge | None = None, **models: Any) -> dict[str, Any]:
    """The losses of a run on a shared device, evaluated before every step, with teachers that follow the student.

    What happened on the device is what the first rank has seen.
    """
    run, device = Run(mesh, steps=steps, **models), Device()
    service = FastRollouts(run.copy)
    if mesh.is_first:  # which alone knows who sleeps
        _watch(run, service, device)
    devices = SharedDevices(Sleepers(device, "rollouts"), Sleepers(device, "teachers"), mesh)
    teachers = _Teachers(device if mesh.is_first else _asleep(Device()))
    evaluator, publisher = ScoringEvaluator(teachers, devices), ScoringPublisher(teachers, devices)
    source = run.source(service, max_staleness=0, devices=devices, judge=judge)
    source.start_at(0)
    publisher.publish(version=0)
    source.publish(version=0)
    losses = []
    for step in range(steps):
        evaluator.evaluate(stop=NEVER)
        losses.append(run.stepper.update(source.next_batch()).loss_nats_per_token)
        publisher.publish(version=step + 1)
        source.publish(version=step + 1)
    devices.close()
    return {"losses": losses, "history": device.history, "asleep": [sorted(tags) for tags in device.asleep.values()]}


def _watch(run: Run, service: FastRollouts, device: Device) -> None:
    publish, sample, rows = run.copy.publish, service.submit, run.teacher.submit

    def watched_publish(*, version: int) -> None:
        device.use("rollouts", {SleepTag.WEIGHTS})
        assert device.asleep["rollouts"] == {SleepTag.KV_CACHE}
        publish(version=version)

    def watched_sample(*arguments: Any, **keywords: Any) -> Ready:
        device.use("rollouts")
        return sample(*arguments, **keywords)

    def watched_rows(sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        device.use("teachers")
        return rows(sequences)

    run.copy.publish = watched_publish  # type: ignore[method-assign]
    service.submit = watched_sample  # type: ignore[method-assign]
    run.teacher.submit = watched_rows  # type: ignore[method-assign]


def _asleep(device: Device) -> Device:
    """One on which rollout servers sleep, and teachers do not."""
    device.asleep["rollouts"] = EVERY_TAG
    return device
