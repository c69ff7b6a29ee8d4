"""Refuses a student whose rows of tokens several ranks cannot hold together, before anything of it loads."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from kdmesh.errors import ConfigError
from kdmesh.models.directory import check_model_directory
from kdmesh.models.vision import reads_images
from kdmesh_trainer.config import TrainerConfig

# Their angles follow from the longest position of a forward, of which a rank sees its own slice alone.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def refuse_unfit_student(cfg: TrainerConfig) -> None:
    """Return where every rank has rows of tokens of its own, or the student's attention can be shared by heads.

    Raises:
        ConfigError: naming the numbers, or what the student has.
    """
    context, path = cfg.parallel.context, cfg.student.model
    if context == 1:
        return
    check_model_directory(path, needs_weights=False)
    whole = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    text = whole.get_text_config()
    if text.num_attention_heads % context:
        raise ConfigError(
            f"parallel.context is {context} and {path} has {text.num_attention_heads} attention heads; it must divide "
            "them"
        )
    if reads_images(whole):
        raise ConfigError(f"parallel.context is {context} and {path} reads images; it must be 1")
    if unfit := _rope_types(text) & _ROPE_BY_LENGTH:
        raise ConfigError(
            f"parallel.context is {context} and {path} has rotary positions of type {', '.join(sorted(unfit))}, which "
            "depend on the longest sequence of a micro-batch; it must be 1"
        )


def _rope_types(config: Any) -> set[str]:
    """Of all its layers; a model may have several sorts of them."""
    told = getattr(config, "rope_parameters", None) or {}
    return {str(each.get("rope_type")) for each in (told, *told.values()) if isinstance(each, dict)}
