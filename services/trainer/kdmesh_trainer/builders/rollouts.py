"""Builds what a job has to do with rollout servers: the pool that asks them, and what brings them the student."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass

from kdmesh.errors import ConfigError
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.weights.sender import Addresses, WeightSender
from kdmesh.weights.buckets import bucket_size
from kdmesh.weights.manifest import UpdatePolicy
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.publisher import StudentPublisher
from kdmesh_trainer.sections.rollouts_config import RolloutsConfig
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.stop import StopSignals
from kdmesh_trainer.student.model import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """The rollout servers of a job; they serve its student."""

    pool: RolloutPool
    publisher: StudentPublisher


def open_rollouts(
    cfg: TrainerConfig, student: Student, mesh: Mesh, signals: StopSignals, stack: ExitStack
) -> Rollouts | None:
    """Those that sample for the run, or else answer its questions; connections are closed with `stack`. Collective.

    Args:
        student: sharded.
        signals: that end the wait for samples, and for servers to take weights.

    Returns:
        None for a run without such servers.

    Raises:
        ConfigError: no address is given.
        ModelMismatch: a server has another model.
        DeadlineExpired: no server answers.
    """
    policy, steps_ahead = UpdatePolicy.FINISH, 0
    if isinstance(cfg.source, OnPolicy):
        key, rollouts, policy = "source.rollouts", cfg.source.rollouts, UpdatePolicy(cfg.source.update_policy)
        steps_ahead = cfg.source.max_staleness
    elif cfg.evaluation.rollouts is not None:
        key, rollouts = "evaluation.rollouts", cfg.evaluation.rollouts
    else:
        return None
    pool = stack.enter_context(
        open_pool(
            key,
            rollouts,
            job=cfg.job_name,
            architecture_fingerprint=student.architecture_fingerprint(),
            steps_ahead=steps_ahead,
        )
    )
    where = pool.addresses if rollouts.has_names else rollouts.addresses
    sender = stack.enter_context(_weight_sender(where, rollouts, student, mesh)) if mesh.is_first else None
    signals.at_last(pool.give_up)
    if sender is not None:
        signals.at_last(sender.give_up)
    publisher = StudentPublisher(student, sender, policy=policy, mesh=mesh, needed=1, come_and_go=rollouts.has_names)
    return Rollouts(pool=pool, publisher=publisher)


def open_pool(
    key: str, rollouts: RolloutsConfig, *, job: str, architecture_fingerprint: str = "", steps_ahead: int = 0
) -> RolloutPool:
    """A connection to each server of the section `key`. Blocks until one is ready.

    Args:
        architecture_fingerprint: of the model that is wanted; empty takes any.
        steps_ahead: whose samples are asked for before those of a step have come.

    Raises:
        ConfigError: no address is given.
        ModelMismatch: a server has another model.
        DeadlineExpired: no server answers.
    """
    if not rollouts.addresses:
        raise ConfigError(f"{key}.addresses is empty; it must name at least one running rollout server")
    pool = RolloutPool(
        rollouts.addresses,
        job=job,
        deadline_s=rollouts.deadline_s,
        requests_ahead=steps_ahead,
        architecture_fingerprint=architecture_fingerprint,
        access=rollouts.access,
    )
    server = pool.describe()
    log.info("rollout server found", extra={"model": server.name, "dtype": server.dtype.value})
    return pool


def _weight_sender(where: Addresses, rollouts: RolloutsConfig, student: Student, mesh: Mesh) -> WeightSender:
    return WeightSender(
        where,
        bucket_bytes=bucket_size(student.size_bytes),
        door=rollouts.door,
        advertise=rollouts.advertise,
        device=mesh.device,
        deadline_s=rollouts.deadline_s,
        access=rollouts.access,
    )
