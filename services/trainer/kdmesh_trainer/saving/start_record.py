"""Writes down what a run was started with, so that it can be understood and done again."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saving.files import append_line, keep_lines

_PACKAGES = (
    "kdmesh",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "peft",
    "compressed-tensors",
    "torchao",
    "liger-kernel",
)


def record_start(cfg: TrainerConfig, identity: Mapping[str, str], *, ranks: int, device: torch.device) -> None:
    """Add a line to OUTPUT/starts.jsonl, which has one for each time that the run was started or continued.

    Args:
        identity: what a checkpoint can only be continued with: the student, the data and the teacher by content.
        ranks: of the whole job.
        device: of this rank.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = cfg.output / "starts.jsonl"
    keep_lines(path, lambda _: True)  # all but one that a full disk, or a kill, cut
    append_line(
        path,
        {
            "time": time.time(),
            "ranks": ranks,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "versions": {"python": platform.python_version(), **_versions()},
            "identity": dict(identity),
            "config": cfg.model_dump(mode="json"),
        },
    )


def _versions() -> dict[str, str]:
    """Of each package that is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
