"""Saved state of a run: complete or absent, never half."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from kdmesh.errors import CheckpointError
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.optimization.rounded_moments import bytes_in_files, has_rounded, widened
from kdmesh_trainer.random_state import random_state, set_random_state
from kdmesh_trainer.saved_config import (
    COMPLETE,
    STATE,
    checkpoints_in,
    read_saved,
    refuse_other_run,
    unreadable,
)
from kdmesh_trainer.saving.files import sync, write_synced
from kdmesh_trainer.saving.seal import damages, digests_of, read_seal, write_seal
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.teacher_copy import TeacherCopy

log = logging.getLogger(__name__)

_METADATA = ".metadata"  # torch's: what lies where
_WRITING = "writing-"
_REMOVING = "removing-"
_PART_WRITTEN = "unexpected pos"  # in torch's words, which do not tell the operating system's
_SLACK_BYTES = 2**20  # metadata, file headers, the other ranks' random states


class CheckpointDirectory:
    """Checkpoints of one run, each a directory that appears under its final name only when all of it is on disk."""

    def __init__(
        self,
        path: Path,
        student: Student,
        optimizer: Optimizer,
        *,
        identity: Mapping[str, str],
        steps: int,
        keep: int,
        due_after_s: float | None = None,
        mesh: Mesh,
        teacher_copy: TeacherCopy | None = None,
    ) -> None:
        """
        Args:
            path: where checkpoints lie; shared by all ranks.
            identity: what must be the same for a checkpoint to be continued, by configuration key.
            steps: of the whole run.
            keep: how many of the newest to keep.
            due_after_s: so long after the last one, or the start, another is due; None: never.
            teacher_copy: what a teacher that follows the student is to have; None: it does not.
        """
        self._path = path
        self._student = student
        self._optimizer = optimizer
        self._identity = dict(identity)
        self._steps = steps
        self._keep = keep
        self._due_after_s = due_after_s
        self._last_s = time.monotonic()
        self._mesh = mesh
        self._teacher_copy = teacher_copy

    def restore(self) -> int:
        """Load the newest checkpoint; the step to continue with, 0 when there is none. Collective.

        Works on any number of ranks. Removes what an interrupted write left, the oldest checkpoints included.

        Raises:
            CheckpointError: it cannot be read, is not what was written, belongs to a run with another identity, or
                is beyond the last step.
        """
        next_step = self._mesh.on_first(self._newest)
        if next_step == 0:
            return 0
        directory = self._directory(next_step)
        self._refuse_damaged(directory)
        world_size = self._mesh.on_first(lambda: self._world_size(directory))
        state, saved = self._trained_state(), self._mesh.on_first(lambda: _saved_names(directory))
        if world_size == self._mesh.world_size:
            # A CPU, which wrote it, had no state of a GPU's.
            random = self._random_state()
            state["random"] = {name: value for name, value in random.items() if f"random.{name}" in saved}
        self._forget_moments(state["optimizer"], but=_with_moments(saved))
        try:
            self._load(state, directory)
        except CheckpointException as error:
            raise unreadable(directory, _cause(error)) from error
        if "random" in state:
            saved_state = {name.rpartition("-")[0]: value for name, value in state["random"].items()}
            set_random_state(saved_state, self._mesh.device)
        self._mesh.on_first(self._remove_oldest)
        log.info("continuing from a checkpoint", extra={"step": next_step, "path": str(directory)})
        return next_step

    def _load(self, state: dict[str, Any], directory: Path) -> None:
        """In place: the tensors of `state` are those that are trained. Raises CheckpointException."""
        try:
            load(state, checkpoint_id=directory)
        except CheckpointException:
            if not has_rounded(state["optimizer"]):
                raise
            # On another number of ranks, a rank's part may begin within a block of them.
            with widened(state["optimizer"]) as wide:
                load({**state, "optimizer": wide}, checkpoint_id=directory)

    def _refuse_damaged(self, directory: Path) -> None:
        """Every rank reads what it wrote, or on another number of ranks its share of them. Collective."""
        by_rank = self._mesh.on_first(lambda: read_seal(directory))
        mine = by_rank[self._mesh.rank :: self._mesh.world_size]
        found = self._mesh.gather([damage for part in mine for damage in damages(directory, part)])
        if told := [damage for part in found for damage in part]:
            raise unreadable(directory, "; ".join(told))

    def is_due(self) -> bool:
        """Whether it is time for another one: by the clock of the first rank. Collective."""
        if self._due_after_s is None:
            return False
        return self._mesh.is_any(self._mesh.is_first and time.monotonic() - self._last_s >= self._due_after_s)

    def save(self, *, next_step: int) -> None:
        """Write everything that continuing at `next_step` needs, then remove the oldest. Collective.

        Raises:
            CheckpointError: it could not be written; nothing of it is left and earlier ones are untouched.
        """
        has_moments = bool(self._optimizer.state)  # else asking for them would make some, and count a step
        state = {**self._trained_state(has_moments=has_moments), "random": self._random_state()}
        needed_bytes = _size_bytes(state) + _SLACK_BYTES
        writing = self._path / f"{_WRITING}{next_step:08d}"
        self._mesh.on_first(lambda: self._begin(writing, needed_bytes))
        try:
            save(state, storage_writer=FileSystemWriter(writing))
        except CheckpointException as error:
            if self._mesh.is_first:
                shutil.rmtree(writing, ignore_errors=True)
            raise self._not_written(writing, needed_bytes, _cause(error)) from error
        written = self._mesh.gather(_written(writing, self._mesh.rank))
        self._mesh.on_first(lambda: self._finish(writing, next_step, needed_bytes, written))
        self._last_s = time.monotonic()

    def _newest(self) -> int:
        for pattern in (_WRITING, _REMOVING):
            for left in self._path.glob(f"{pattern}*"):
                shutil.rmtree(left, ignore_errors=True)
        complete = checkpoints_in(self._path)
        return int(complete[-1].name.removeprefix(COMPLETE)) if complete else 0

    def _world_size(self, directory: Path) -> int:
        """Of the run that wrote it, if it is this one."""
        refuse_other_run(directory, self._identity, steps=self._steps)
        return read_saved(directory).world_size

    def _begin(self, writing: Path, needed_bytes: int) -> None:
        try:
            writing.mkdir(parents=True)
            free_bytes = shutil.disk_usage(writing).free
        except OSError as error:
            raise self._not_written(writing, needed_bytes, str(error)) from error
        if free_bytes < needed_bytes:
            shutil.rmtree(writing, ignore_errors=True)
            raise self._not_written(writing, needed_bytes, "not enough space")

    def _finish(
        self, writing: Path, next_step: int, needed_bytes: int, written: Sequence[dict[str, str] | OSError]
    ) -> None:
        """Seal it and give it its name. `written` is what each rank says of its files."""
        state = {"next_step": next_step, "world_size": self._mesh.world_size, "identity": self._identity}
        try:
            write_synced(writing / STATE, json.dumps(state, indent=1))
            by_rank = [_or_raise(digests) for digests in written]
            by_rank[0] |= digests_of(writing, (_METADATA, STATE))
            write_seal(writing, by_rank)
            sync(writing)
            writing.rename(self._directory(next_step))
            sync(self._path)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise self._not_written(writing, needed_bytes, str(error)) from error
        log.info("checkpoint written", extra={"step": next_step, "path": str(self._directory(next_step))})
        self._remove_oldest()

    def _remove_oldest(self) -> None:
        for directory in checkpoints_in(self._path)[: -self._keep]:
            # Renamed first: a removal that is interrupted must not leave what looks like a checkpoint.
            removing = directory.with_name(f"{_REMOVING}{directory.name}")
            directory.rename(removing)
            shutil.rmtree(removing, ignore_errors=True)

    def _directory(self, next_step: int) -> Path:
        return self._path / f"{COMPLETE}{next_step:08d}"

    def _trained_state(self, *, has_moments: bool = True) -> dict[str, Any]:
        """This rank's shards of what changes: trained weights and their moments by name, shared weights once, and a
        teacher's copy of them.
        """
        release(self._student)  # an evaluation may have been broken off
        trained = {name for name, parameter in self._student.named_parameters() if parameter.requires_grad}
        others = {name for name, _ in self._student.named_parameters(remove_duplicate=False)} - trained
        model = get_model_state_dict(self._student)
        optimizer = get_optimizer_state_dict(self._student, self._optimizer) if has_moments else {"state": {}}
        return {
            "model": {name: value for name, value in model.items() if name not in others},
            # Rates and decays are the configuration's, which may have changed since.
            "optimizer": optimizer["state"],
            "teacher": {} if self._teacher_copy is None else self._teacher_copy.state(),
        }

    def _forget_moments(self, moments: dict[str, Any], *, but: Collection[str]) -> None:
        """Those of parameters that had none when a checkpoint was written, since no gradient had come to them."""
        parameters = dict(self._student.named_parameters())
        for name in moments.keys() - set(but):
            del moments[name], self._optimizer.state[parameters[name]]

    def _random_state(self) -> dict[str, Tensor]:
        return {f"{kind}-{self._mesh.rank}": state for kind, state in random_state(self._mesh.device).items()}

    def _not_written(self, path: Path, needed_bytes: int, why: str) -> CheckpointError:
        existing = next(parent for parent in (self._path, *self._path.parents) if parent.exists())
        free_bytes = shutil.disk_usage(existing).free
        return CheckpointError(
            f"checkpoint {path} was not written: {why} ({needed_bytes} bytes needed, {free_bytes} bytes free); "
            "earlier checkpoints are untouched"
        )


def _written(writing: Path, rank: int) -> dict[str, str] | OSError:
    """Digests of the files that a rank has written, or why they cannot be read."""
    try:
        return digests_of(writing, sorted(path.name for path in writing.glob(f"__{rank}_*")))
    except OSError as error:
        return error


def _or_raise(digests: dict[str, str] | OSError) -> dict[str, str]:
    if isinstance(digests, OSError):
        raise digests
    return digests


def _saved_names(directory: Path) -> frozenset[str]:
    """Of everything in a checkpoint, with the names of what it is in before it."""
    try:
        return frozenset(FileSystemReader(directory).read_metadata().state_dict_metadata)
    except Exception as error:  # a pickle that is damaged may raise anything
        raise unreadable(directory, _root(error)) from error


def _with_moments(saved: Collection[str]) -> set[str]:
    """The parameters of which a checkpoint has them."""
    prefix = "optimizer."
    return {name.removeprefix(prefix).rpartition(".")[0] for name in saved if name.startswith(prefix)}


def _size_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of all tensors, over all shards."""
    return sum(bytes_in_files(value) if isinstance(value, Tensor) else _size_bytes(value) for value in state.values())


def _cause(error: CheckpointException) -> str:
    """Why each failing rank failed, without its traceback."""
    return "; ".join(sorted({_root(cause) for cause, _ in error.failures.values()}))


def _root(error: BaseException) -> str:
    """The operating system's own words where there are any: torch hides them behind an assertion of its own."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return str(link)
        link = link.__cause__ or link.__context__
    if _PART_WRITTEN in str(error):
        return "a file of it could not be written whole: the disk is full, or files may not be so large (ulimit -f)"
    return f"{type(error).__name__}: {error}"
