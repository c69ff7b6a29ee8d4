"""Sends a run's figures to experiment trackers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, assert_never

from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saving.files import write_synced, written_beside_checkpoints
from kdmesh_trainer.sections.job_config import TrackerName

_PROJECT = "kdmesh"
_GROUPS = ("held_out", "questions", "train")  # what is before the slash of a figure's name, as they come in a step


class Tracker(Protocol):
    """Somewhere that draws curves. Started once, then fed in order, then closed."""

    def start(self, first_step: int) -> None:
        """The run begins, or continues, at `first_step`; later figures of an earlier attempt are superseded."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of one group, as `train/loss`, of one step."""
        ...

    def close(self, *, has_failed: bool = False) -> None:
        """Write out what is pending, and say how the run ended; one that was stopped has not failed."""
        ...


def build_trackers(cfg: TrainerConfig) -> list[Tracker]:
    """The trackers that `cfg` names.

    Raises:
        ConfigError: one of them is not installed; the message says how to install it.
    """
    return [_build(name, cfg) for name in cfg.trackers]


def _build(name: TrackerName, cfg: TrainerConfig) -> Tracker:
    match name:
        case "tensorboard":
            return TensorBoard(_load("torch.utils.tensorboard", "tensorboard", "tensorboard"), cfg.output)
        case "wandb":
            return WandB(_load("wandb", "wandb", "kdmesh[wandb]"), cfg)
        case "mlflow":
            return MLflow(_load("mlflow", "mlflow", "kdmesh[mlflow]"), cfg)
        case _:
            assert_never(name)


def _load(module: str, tracker: str, requirement: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"tracker {tracker!r} cannot be loaded ({error}): install it with `pip install '{requirement}'`, "
            "or leave it out of `trackers`"
        ) from None


class TensorBoard:
    """Event files in `output`/tensorboard. Raises CheckpointError when they cannot be written."""

    def __init__(self, module: ModuleType, output: Path) -> None:
        self._module = module
        self._directory = output / "tensorboard"
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        """Hide what an earlier attempt wrote from `first_step` on."""
        with written_beside_checkpoints(self._directory):
            self._writer = self._module.SummaryWriter(str(self._directory), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars."""
        with written_beside_checkpoints(self._directory):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self, *, has_failed: bool = False) -> None:
        """Write out what is pending; event files say nothing of how a run ended."""
        if self._writer is not None:
            with written_beside_checkpoints(self._directory):
                self._writer.close()


class WandB:
    """A Weights & Biases run, continued by the id kept in `output`. Raises CheckpointError when it cannot be kept."""

    def __init__(self, module: ModuleType, cfg: TrainerConfig) -> None:
        self._module = module
        self._cfg = cfg
        self._run: Any = None

    def start(self, first_step: int) -> None:
        """Open the run, or the one that `output` belongs to."""
        id_file = self._cfg.output / "wandb_run_id"
        self._run = self._module.init(
            # What W&B's own variables say, which an argument would overrule; it reads the others itself.
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=os.environ.get("WANDB_NAME") or self._cfg.job_name,
            dir=str(self._cfg.output),
            id=_kept_id(id_file),
            resume="allow",
            config={**self._cfg.model_dump(mode="json"), "first_step": first_step},
        )
        self._run.define_metric("*", step_metric="step")
        with written_beside_checkpoints(id_file):
            write_synced(id_file, self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars, to be drawn over `step`; a repeated stretch keeps its first figures.

        W&B's own count of steps ignores all that an earlier attempt has reached, so each group has one to itself: the
        student after the last step is judged under a number that the next one, when the run goes on, needs too.
        """
        if values:
            group, _, _ = next(iter(values)).partition("/")
            self._run.log({"step": step, **values}, step=len(_GROUPS) * step + _GROUPS.index(group))

    def close(self, *, has_failed: bool = False) -> None:
        """Upload what is pending."""
        if self._run is not None:
            self._run.finish(exit_code=int(has_failed))


class MLflow:
    """An MLflow run, continued by the id kept in `output`. Raises CheckpointError when it cannot be kept."""

    def __init__(self, module: ModuleType, cfg: TrainerConfig) -> None:
        self._module = module
        self._cfg = cfg
        self._is_open = False

    def start(self, first_step: int) -> None:
        """Open the run, or the one that `output` belongs to."""
        id_file = self._cfg.output / "mlflow_run_id"
        if (run_id := _kept_id(id_file)) is not None:
            self._module.start_run(run_id=run_id)
        else:
            if not (os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID")):
                self._module.set_experiment(_PROJECT)
            run = self._module.start_run(run_name=self._cfg.job_name)
            with written_beside_checkpoints(id_file):
                write_synced(id_file, run.info.run_id)
            self._module.log_dict(self._cfg.model_dump(mode="json"), "config.json")
        self._is_open = True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars; MLflow keeps every value of a repeated step."""
        self._module.log_metrics(dict(values), step=step)

    def close(self, *, has_failed: bool = False) -> None:
        """End the run."""
        if self._is_open:
            self._module.end_run("FAILED" if has_failed else "FINISHED")


def _kept_id(path: Path) -> str | None:
    """Of the run that `output` belongs to; None: none was begun, or what was to say so was cut off."""
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None
