"""Parameters that are not trained, by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdmesh.errors import ConfigError
from kdmesh.models.images.vision import vision_parts
from kdmesh.parameter_names import is_meant, names_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def check_freeze(patterns: Sequence[str], model: Path) -> None:
    """As `freeze` on a model without memory.

    Raises:
        ConfigError: as `freeze`, or the directory is no model that transformers builds.
    """
    # Not at the top: benchmarks of the GPU take a student apart without what loads one.
    from kdmesh.models.body import empty_causal_lm, without_memory

    if patterns:
        with without_memory():
            freeze(empty_causal_lm(model), patterns)


def freeze(lm: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter that one of `patterns` names, in place.

    A pattern is the name of a parameter or of a module, which stands for all of its parameters. `*`, `?` and `[0-9]`
    stand for characters between two dots. A parameter that has two names, as a tied head, is frozen by either.

    Args:
        lm: whole, not sharded; its own names count, which are those of its files but for a few mixtures and models
            that read images.

    Raises:
        ConfigError: a pattern names nothing, or nothing would be left to train.
    """
    named = dict(lm.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        chosen = [parameter for name, parameter in named.items() if is_meant(pattern, name)]
        if not chosen:
            raise ConfigError(f"student.freeze: {names_nothing(pattern, named)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    trained, frozen = (
        sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad is is_trained)
        for is_trained in (True, False)
    )
    if not trained:
        raise ConfigError(f"student.freeze: [{', '.join(patterns)}] leaves no parameter to train")
    log.info("parameters frozen", extra={"frozen_parameters": frozen, "trained_parameters": trained})


def freeze_vision(lm: PreTrainedModel) -> None:
    """Leave the vision tower of a model that reads images, with its projector, as it is, in place."""
    for parameter in vision_parts(lm)[1]:
        parameter.requires_grad_(False)


def rest_in_bfloat16(lm: nn.Module) -> None:
    """Keep frozen parameters that bfloat16 holds exactly, as those of most checkpoints, in it."""
    for parameter in lm.parameters():
        if parameter.requires_grad or not parameter.is_floating_point():
            continue
        rounded = parameter.detach().bfloat16()
        if torch.equal(rounded.to(parameter.dtype), parameter):
            parameter.data = rounded
