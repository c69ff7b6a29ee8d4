"""Refuses a student that cannot compute sequences as long as the data's, before anything of it loads."""

from __future__ import annotations

import logging

from kdmesh.errors import ConfigError
from kdmesh.models.directory import read_config
from kdmesh.models.positions import ROPE_BY_LENGTH, rope_types, safe_limit
from kdmesh_trainer.config import TrainerConfig

log = logging.getLogger(__name__)


def refuse_short_student(cfg: TrainerConfig) -> None:
    """Return where the student has a position for every token, be it one that it never learnt.

    Raises:
        ConfigError: naming the numbers, and why they must fit.
    """
    path, longest = cfg.student.model, cfg.data.max_tokens
    config = read_config(path)
    limit, types = safe_limit(config), rope_types(config)
    if limit is None or longest <= limit:
        return
    if by_length := types & ROPE_BY_LENGTH:
        raise ConfigError(
            f"data.max_tokens is {longest}; {path} has rotary positions of type {', '.join(sorted(by_length))}, and "
            f"beyond {limit} tokens they would be others for all sequences of a micro-batch: it must be at most {limit}"
        )
    if not types:
        raise ConfigError(f"data.max_tokens is {longest}; {path} has positions for {limit} tokens, and for no more")


def warn_of_new_positions(cfg: TrainerConfig) -> None:
    """Tell the log where tokens may be at positions beyond those that the student has learnt."""
    config = read_config(cfg.student.model)
    limit = safe_limit(config)
    if limit is not None and cfg.data.max_tokens > limit:
        facts = {"max_tokens": cfg.data.max_tokens, "positions": limit}
        log.warning("data.max_tokens is beyond the student's positions", extra=facts)
