"""The command line of one rank of the trainer."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from kdmesh.interrupt import INTERRUPTED, quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.config import config_parser, load
    from kdmesh.errors import KdmeshError, OutOfMemory
    from kdmesh.exit_codes import exit_code
    from kdmesh.open_files import raise_open_files
    from kdmesh.outputs import say_error
    from kdmesh_trainer.config import TrainerConfig
    from kdmesh_trainer.sections.source_config import OnPolicy

if TYPE_CHECKING:
    from kdmesh_trainer.mesh import Mesh

logger = logging.getLogger("kdmesh_trainer")  # not __name__, which is "__main__" here

_BROKEN = 1


class _Failed(Exception):
    """This rank fails, as has been told. Raised, because `joined` leaves the other ranks otherwise then."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def main() -> int:
    """Parse, check, train; run it under torchrun, or alone as the only rank.

    Returns:
        The exit status: 0 when all steps are done, or when SIGTERM or SIGINT ended the run with
        a checkpoint, unless KDMESH_EXIT_WHEN_STOPPED names another for that; 2 when something
        was refused, and 3 when a service did not answer in time, in one sentence; 1 when another
        rank ended; 130 when a signal came before the first step was done.
    """
    arguments = _parser().parse_args()
    rank = int(os.environ.get("RANK", "0"))
    try:
        raise_open_files()
        cfg = load(TrainerConfig, arguments.config, arguments.set)
        cfg.parallel.check_ranks(int(os.environ.get("WORLD_SIZE", "1")))
    except KdmeshError as error:
        return _refused(error, is_speaker=rank == 0)
    log.configure("trainer", rank=rank)
    return _join(cfg)


def _parser() -> argparse.ArgumentParser:
    return config_parser("kdmesh_trainer", "Train a student: one rank, in the environment torchrun gives.")


def _join(cfg: TrainerConfig) -> int:
    # Not at the top: a bad configuration must not wait for torch.
    with quiet_interrupt():
        from kdmesh_trainer.mesh import joined

    try:
        wait_s, parallel = _longest_wait_s(cfg), cfg.parallel
        with joined(
            cfg.student.device, longest_wait_s=wait_s, shard_ranks=parallel.shard_ranks, context=parallel.context
        ) as mesh:
            return _train(cfg, mesh)
    except _Failed as failed:
        return failed.status
    except KdmeshError as error:
        return _refused(error, is_speaker=True)


def _longest_wait_s(cfg: TrainerConfig) -> float:
    """How long services may keep one rank, one after the other, while the others wait for it."""
    teacher_s = sum(teacher.deadline_s for teacher in cfg.all_teachers.values())
    # For samples, also of steps ahead, and for a server to take the weights.
    if isinstance(cfg.source, OnPolicy):
        return teacher_s + (cfg.source.max_staleness + 2) * cfg.source.rollouts.deadline_s
    return teacher_s + (0.0 if cfg.evaluation.rollouts is None else 2 * cfg.evaluation.rollouts.deadline_s)


def _train(cfg: TrainerConfig, mesh: Mesh) -> int:
    import torch
    from transformers.utils import logging as transformers_logging

    from kdmesh.tracing.spans import tracing
    from kdmesh_trainer.build import built
    from kdmesh_trainer.loop import run
    from kdmesh_trainer.stop import StopSignals

    transformers_logging.disable_progress_bar()
    signals = StopSignals()
    try:
        with (
            tracing("trainer", cfg.tracing, rank=mesh.rank),
            built(cfg, mesh=mesh, signals=signals) as (parts, schedule),
            signals,
        ):
            done = run(parts, schedule)
    except KdmeshError as error:
        raise _Failed(_refused(error, is_speaker=mesh.is_first_to_fail())) from error
    except KeyboardInterrupt as error:  # before the first step, where there is nothing to save
        raise _Failed(INTERRUPTED) from error
    except torch.OutOfMemoryError as error:
        raise _Failed(_refused(_too_large(error, mesh.rank), is_speaker=mesh.is_first_to_fail())) from error
    except RuntimeError as error:
        # A collective fails when another rank has gone: that one has said why, or was killed.
        if mesh.is_first_to_fail():
            raise
        raise _Failed(_BROKEN) from error
    except Exception:
        mesh.is_first_to_fail()  # the others, whose collectives fail now, are not to speak instead
        raise
    if done < schedule.steps:
        logger.info("stopped", extra={"steps_done": done, "next": "run the same command to continue"})
        # Stopped while it was judged before its first step, a run has no checkpoint.
        return int(os.environ.get("KDMESH_EXIT_WHEN_STOPPED", "0" if done > 0 else INTERRUPTED))
    return 0


def _too_large(error: RuntimeError, rank: int) -> OutOfMemory:
    """In a sentence: torch's own also tells of other processes, and of settings of its allocator."""
    said = ". ".join(str(error).split(". ")[:3])
    return OutOfMemory(
        f"rank {rank} has no memory left on its device: {said}. `kdmesh plan` says what takes most; a lower "
        "batch.max_tokens takes less at once, and student.activation_checkpointing less again (docs/troubleshooting.md)"
    )


def _refused(error: KdmeshError, *, is_speaker: bool) -> int:
    if is_speaker:
        say_error(error)
    return exit_code(error)


def _leave(status: int) -> NoReturn:
    """End this process without tearing the interpreter down.

    Everything is closed by now but NCCL's groups of a rank that failed, which are not to be waited for. gloo's threads
    may still let go of tensors, and one that does so while the interpreter goes down aborts the process: about one run
    in a hundred (pytorch/pytorch#179291, #190489).
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: the process was started without it
        stream.flush()
    os._exit(status)


def _told() -> int:
    """As `main`; what nobody caught is told as Python, or torch with the rank before it, tells it."""
    try:
        return main()
    except Exception:  # noqa: BLE001  # it is told, and the process ends
        sys.excepthook(*sys.exc_info())
        return _BROKEN


if __name__ == "__main__":
    _leave(_told())
