"""What a checkpoint says of the configuration it was saved with: read without torch, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdmesh.config import StrictModel
from kdmesh.errors import CheckpointError
from kdmesh_trainer.config import TrainerConfig

COMPLETE = "step-"
STATE = "state.json"

_CONFIGURED = (
    "batch.sequences",
    "objective",
    "optimizer.moments",
    "optimizer.name",
    "seed",
    "student.freeze",
    "student.freeze_vision",
    "student.lora",
    "student.quantization",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What lies in state.json."""

    next_step: int
    world_size: int
    identity: Mapping[str, str]


def checkpoints_in(path: Path) -> list[Path]:
    """The complete ones, from the oldest to the newest."""
    return sorted(path.glob(f"{COMPLETE}{'[0-9]' * 8}"))


def read_saved(checkpoint: Path) -> SavedRun:
    """What a checkpoint says. Raises CheckpointError when it cannot be read, or is in another's place."""
    try:
        told = read_json(checkpoint, STATE)
    except FileNotFoundError:
        raise unreadable(checkpoint, f"there is no {STATE} in it") from None
    try:
        saved = SavedRun(**told)
        if saved.next_step != int(checkpoint.name.removeprefix(COMPLETE)):
            raise ValueError(f"it is of a checkpoint after {saved.next_step} steps")
        if not isinstance(saved.identity, dict):
            raise ValueError("its identity is no table")
        return saved
    except TypeError:
        raise unreadable(checkpoint, f"{STATE} does not say what it is to say") from None
    except ValueError as error:
        raise unreadable(checkpoint, f"{STATE}: {error}") from None


def read_json(checkpoint: Path, name: str) -> Any:
    """What a file of a checkpoint holds. Raises CheckpointError, and FileNotFoundError where there is none."""
    try:
        text = (checkpoint / name).read_bytes()
        return json.loads(text)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(checkpoint, f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise unreadable(checkpoint, f"{name} is {'cut short, or not JSON' if text else 'empty'}") from error


def unreadable(checkpoint: Path, why: str) -> CheckpointError:
    """What to say of a checkpoint that cannot be read, and of what becomes of the run without it."""
    earlier = [path.name for path in checkpoints_in(checkpoint.parent) if path.name < checkpoint.name]
    without = f"continues from {earlier[-1]}" if earlier else "begins anew"
    return CheckpointError(f"{checkpoint} cannot be read: {why}. Without that directory the run {without}")


def configured_identity(cfg: TrainerConfig) -> dict[str, str]:
    """What a checkpoint can only be continued with, by configuration key: as far as the configuration says it."""
    identity = {
        "objective": _as_text(cfg.objective),
        "batch.sequences": str(cfg.batch.sequences),
        "seed": str(cfg.seed),
    }
    if cfg.student.lora is not None:
        identity["student.lora"] = _as_text(cfg.student.lora)
    if cfg.student.quantization is not None:
        identity["student.quantization"] = _as_text(cfg.student.quantization)
    if cfg.student.freeze:
        identity["student.freeze"] = ", ".join(sorted(cfg.student.freeze))
    if cfg.student.freeze_vision:
        identity["student.freeze_vision"] = "true"
    if cfg.optimizer.name != "adamw":
        identity["optimizer.name"] = cfg.optimizer.name
    if cfg.optimizer.moments != "float32":
        identity["optimizer.moments"] = cfg.optimizer.moments
    return identity


def _as_text(section: StrictModel) -> str:
    return json.dumps(section.model_dump(mode="json"), sort_keys=True)


def refuse_other_configuration(cfg: TrainerConfig) -> None:
    """Raises CheckpointError when `output` holds a checkpoint that this configuration cannot continue."""
    refuse_other_output(cfg.output, configured_identity(cfg), steps=cfg.steps, among=_CONFIGURED)


def refuse_other_output(
    output: Path, identity: Mapping[str, str], *, steps: int | None, among: Collection[str] | None = None
) -> None:
    """As refuse_other_run, of the newest checkpoint in a run's directory, if there is one."""
    if checkpoints := checkpoints_in(output / "checkpoints"):
        refuse_other_run(checkpoints[-1], identity, steps=steps, among=among)


def refuse_other_run(
    checkpoint: Path, identity: Mapping[str, str], *, steps: int | None, among: Collection[str] | None = None
) -> None:
    """Return when a run with this identity and so many steps can continue it.

    Args:
        steps: None while nobody knows them.
        among: the keys that `identity` would have by now; None: all.

    Raises:
        CheckpointError: it cannot be read, belongs to a run with another identity, or is beyond the last step.
    """
    saved = read_saved(checkpoint)
    keys = saved.identity.keys() | identity.keys() if among is None else among
    differing = [key for key in sorted(keys) if saved.identity.get(key) != identity.get(key)]
    if differing:
        told = "; ".join(f"{key} is {identity.get(key)} now and was {saved.identity.get(key)}" for key in differing)
        is_data = any(key.startswith("data.train (digest") for key in differing)
        hint = " (files, or `data.max_tokens` and what else they are read by, are others)" if is_data else ""
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {told}{hint}. "
            "Restore the configuration, or give this run another `output`"
        )
    if steps is not None and saved.next_step > steps:
        raise CheckpointError(
            f"{checkpoint} is after {saved.next_step} steps, and the run is to have only {steps}: raise `steps`, or "
            "`epochs`"
        )
