"""What a trainer asks of its ranks and their devices, held against a machine without loading torch."""

from __future__ import annotations

import json

from kdmesh.errors import ConfigError
from kdmesh.launch import local
from kdmesh_trainer.config import TrainerConfig


def refuse_unfit_machine(cfg: TrainerConfig, *, ranks: int) -> None:
    """Returns when that many ranks on machines like this one can train as `cfg` says, as far as can be told here.

    The ranks find the same, but only when a teacher of the run's own has loaded.

    Raises:
        ConfigError: they cannot.
    """
    cfg.parallel.check_ranks(ranks)
    if cfg.student.device == "cuda" and not local.may_have_gpu():
        raise ConfigError("student.device is cuda, but there is no GPU on this machine")
    if cfg.student.liger_kernels and (cfg.student.device == "cpu" or not local.may_have_gpu()):
        raise ConfigError("student.liger_kernels needs a GPU: they are Triton's, and the device is a cpu")
    context, heads = cfg.parallel.context, _num_attention_heads(cfg)
    if heads is not None and cfg.parallel.exchange(heads) == "heads" and heads % context:
        raise ConfigError(
            f"parallel.context is {context} and {cfg.student.model} has {heads} attention heads; it must divide them, "
            "or parallel.context_exchange be keys"
        )


def _num_attention_heads(cfg: TrainerConfig) -> int | None:
    """As the model's config.json says; None where it does not in the usual words."""
    try:
        whole = json.loads((cfg.student.model / "config.json").read_bytes())
        text = whole.get("text_config", whole)
        return int(text["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
