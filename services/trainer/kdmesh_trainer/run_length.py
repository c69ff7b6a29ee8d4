"""How many steps a run has."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.rules.length import unfit_length
from kdmesh_trainer.sections.source_config import OnPolicy

log = logging.getLogger(__name__)


def num_steps(cfg: TrainerConfig, num_items: int) -> int:
    """Optimizer steps in all: those of the configuration, or those that its epochs make.

    Args:
        num_items: sequences that are trained on, of all datasets of a blend; on-policy, prompts that are sampled from.

    Raises:
        ConfigError: the epochs make too few steps for what else is configured, or more than a run can have.
    """
    if cfg.steps is not None:
        return cfg.steps
    assert cfg.epochs is not None  # the configuration's
    what, per_step = "sequences", cfg.batch.sequences
    if isinstance(cfg.source, OnPolicy):
        what, per_step = "prompts", cfg.source.prompts_of(per_step)
    steps = math.ceil(Fraction(str(cfg.epochs)) * num_items / per_step)  # 0.1 as it is written: 3 of 30
    if (why := unfit_length(cfg, steps)) is not None:
        raise ConfigError(f"epochs ({cfg.epochs:g}) of {num_items} {what}, {per_step} in a step: {why}")
    log.info("epochs counted", extra={"epochs": cfg.epochs, what: num_items, "per_step": per_step, "steps": steps})
    return steps
