"""Refuses a student whose rows of tokens several ranks cannot hold together, before anything of it loads."""

from __future__ import annotations

from kdmesh.errors import ConfigError
from kdmesh.models.directory import read_config
from kdmesh.models.images.vision import reads_images
from kdmesh.models.positions import ROPE_BY_LENGTH, rope_types
from kdmesh.models.recurrent import is_recurrent
from kdmesh_trainer.config import TrainerConfig


def refuse_unfit_student(cfg: TrainerConfig) -> None:
    """Return where every rank has rows of tokens of its own, or several can share the student's attention.

    Raises:
        ConfigError: naming the numbers, or what the student has.
    """
    context, path = cfg.parallel.context, cfg.student.model
    if context == 1:
        return
    whole = read_config(path)
    text = whole.get_text_config()
    heads = text.num_attention_heads
    if cfg.parallel.exchange(heads) == "heads" and heads % context:
        raise ConfigError(
            f"parallel.context is {context} and {path} has {heads} attention heads; it must divide them, or "
            "parallel.context_exchange be keys"
        )
    if reads_images(whole):
        raise ConfigError(f"parallel.context is {context} and {path} reads images; it must be 1")
    if is_recurrent(whole):  # a slice would need the state that the slice before it ends with
        raise ConfigError(
            f"parallel.context is {context} and {path} has layers that carry a state from token to token; it must be 1"
        )
    if unfit := rope_types(whole) & ROPE_BY_LENGTH:  # a rank sees its own slice alone
        raise ConfigError(
            f"parallel.context is {context} and {path} has rotary positions of type {', '.join(sorted(unfit))}, which "
            "depend on the longest sequence of a micro-batch; it must be 1"
        )
