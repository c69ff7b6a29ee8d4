"""Low-rank adapters: put into a model by peft, and taken apart again where a plain model is wanted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh_trainer.student.four_bit import refuse_uneven, rest_in_four_bits
from kdmesh_trainer.student.freezing import rest_in_bfloat16
from kdmesh_trainer.student.linear_modules import linear_modules

if TYPE_CHECKING:
    import peft

    from kdmesh_trainer.sections.lora_config import LoraConfig

log = logging.getLogger(__name__)

_NAME = "default"  # of the one adapter, as peft calls it
_BASE = ".base_layer"
_FACTORS = (f"lora_A.{_NAME}.weight", f"lora_B.{_NAME}.weight")
_MAGNITUDE = f"lora_magnitude_vector.{_NAME}"
# The names of an adapter's tensors in a model, and in a file.
_SAVED = {
    _FACTORS[0]: "lora_A.weight",
    _FACTORS[1]: "lora_B.weight",
    f"{_MAGNITUDE}.weight": "lora_magnitude_vector",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What is added to a matrix: scaling * b @ a. Either may be a shard.

    With magnitudes every row of the sum is then brought to its length.
    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scaling: float
    magnitude: Tensor | None  # [out] or a shard of it; None: the sum is what it is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """What `add_adapter` has put into a model."""

    config: peft.LoraConfig
    layers: Collection[str]  # names of the linear modules that have one
    scaling: float

    def plain_name(self, name: str) -> str:
        """The name that a tensor has in the model without an adapter."""
        module, _, last = name.rpartition(".")
        layer = module.removesuffix(_BASE)
        return f"{layer}.{last}" if layer in self.layers else name

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
        """The tensors without those of the adapter; what is added to each that has something added to it.

        Args:
            tensors: of the model, by their names in its state dict.
        """
        rest, added = dict(tensors), {}
        for layer in self.layers:
            a, b = (rest.pop(f"{layer}.{name}") for name in _FACTORS)
            magnitude = rest.pop(f"{layer}.{_MAGNITUDE}.weight", None)
            added[f"{layer}{_BASE}.weight"] = LowRank(a=a, b=b, scaling=self.scaling, magnitude=magnitude)
        return rest, added

    def saved_name(self, name: str) -> str | None:
        """The name that a tensor of the adapter has in a file that peft reads; None when it is not the adapter's."""
        for own, saved in _SAVED.items():
            layer = name.removesuffix(f".{own}")
            if layer != name and layer in self.layers:
                return f"base_model.model.{layer}.{saved}"
        return None


def check_adapter(config: LoraConfig | None, model: Path) -> None:
    """As inject_adapter on a model without memory.

    Raises:
        ConfigError: as inject_adapter, or the directory is no model that transformers builds.
    """
    # Not at the top: benchmarks of the GPU put adapters on without what loads a model.
    from kdmesh.models.body import empty_causal_lm, without_memory

    if config is not None:
        with without_memory():
            inject_without_memory(empty_causal_lm(model), config)


def train_adapted(lm: PreTrainedModel, config: LoraConfig) -> None:
    """Without an adapter: train the matrices that would get one, and nothing else, in place. Raises ConfigError."""
    names = {f"{name}.weight" for name in _targets(lm, config, _linear(lm))}
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(name in names)


def add_adapter(lm: PreTrainedModel, config: LoraConfig, *, seed: int) -> Adapter:
    """As inject_adapter; frozen weights that bfloat16 holds exactly, as those of most checkpoints, are kept in it."""
    adapter = inject_adapter(lm, config, seed=seed)
    rest_in_bfloat16(lm)
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    facts = {"modules": len(adapter.layers), "adapter_rank": config.rank, "trained_parameters": trained}
    log.info("adapter added", extra=facts)
    return adapter


def inject_adapter(lm: PreTrainedModel, config: LoraConfig, *, seed: int) -> Adapter:
    """Put an adapter into `lm`, in place, and freeze everything else. It begins as zero, so `lm` says what it said.

    With DoRA that is so to rounding; with a base in four bits it says what that is rounded to.

    Args:
        lm: whole, not sharded.
        seed: of the adapter's first weights.

    Raises:
        ConfigError: peft is not installed, or `config.target_modules` names what cannot have an adapter, or what peft
            would put one elsewhere for, or `config.base` cannot hold a matrix.
    """
    linear = _linear(lm)
    layers = _targets(lm, config, linear)
    if config.base == "nf4":
        refuse_uneven(lm, linear)
    try:
        import peft
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ConfigError(f"student.lora needs peft (pip install 'kdmesh[lora]'): {error}") from error
    told = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=sorted(layers),
        task_type=peft.TaskType.CAUSAL_LM,
    )

    def adapted() -> set[str]:
        return {name for name, module in lm.named_modules() if isinstance(module, LoraLayer)}

    torch.manual_seed(seed)
    try:
        _inject(told, lm)
    except ValueError as error:
        if config.use_dora or config.dropout:
            # Experts can have neither, so peft ended before it was known where it puts adapters.
            with suppress(ValueError):
                _inject(replace(told, use_dora=False, lora_dropout=0.0), lm)
                _refuse_others(lm, layers, adapted())
        raise ConfigError(f"student.lora.target_modules: {error}") from error
    _refuse_others(lm, layers, adapted())
    if config.base == "nf4":
        # After peft, which knows nothing of what then is there.
        rest_in_four_bits(lm, [f"{name}{_BASE}" if name in layers else name for name in linear])
    lm.eval()
    return Adapter(config=told, layers=frozenset(layers), scaling=config.scale)


def inject_without_memory(lm: PreTrainedModel, config: LoraConfig) -> Adapter:
    """As inject_adapter of a model without memory, for a caller under FakeTensorMode."""
    # peft moves what it makes to where the model is; tensors without memory cannot be moved, and are there.
    with mock.patch.object(nn.Module, "to", lambda module, *_, **__: module):
        return inject_adapter(lm, config, seed=0)


def _inject(told: peft.LoraConfig, lm: PreTrainedModel) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Of mixtures that are refused next, with what works instead.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        inject_adapter_in_model(told, lm, adapter_name=_NAME)


def _linear(lm: PreTrainedModel) -> list[str]:
    """Names of the linear modules of the body."""
    linear = linear_modules(lm)
    if not linear:
        raise ConfigError(f"student.lora: the body of {lm.config.model_type} has no linear modules (torch.nn.Linear)")
    return linear


def _targets(lm: PreTrainedModel, config: LoraConfig, linear: list[str]) -> list[str]:
    """Those of `linear` that get an adapter."""
    if config.target_modules == "all-linear":
        return linear
    others = [name for name, module in lm.named_modules() if name not in linear and _own_tensors(module)]
    for target in config.target_modules:
        if not any(_is_meant(target, name) for name in linear):
            what = (
                "is not linear, or outside of the body" if any(_is_meant(target, n) for n in others) else "is unknown"
            )
            known = ", ".join(sorted({_last(name) for name in linear}))
            raise ConfigError(f"student.lora.target_modules: {target} {what}; linear modules of the body: {known}")
    return [name for name in linear if any(_is_meant(target, name) for target in config.target_modules)]


def _refuse_others(lm: PreTrainedModel, asked: list[str], found: set[str]) -> None:
    """peft 0.21 takes what is named as the experts of some mixtures for these, and leaves out shared ones."""
    without, beside = sorted(set(asked) - found), sorted(found - set(asked))
    if without or beside:
        possible = sorted({_last(name) for name in found.intersection(asked)} - {_last(name) for name in without})
        raise ConfigError(
            f"student.lora.target_modules: in {lm.config.model_type} peft puts no adapter on {len(without)} of the "
            f"modules that are asked for ({', '.join(without[:3])}), and one on {len(beside)} others "
            f"({', '.join(beside[:3])}); name others, as [{', '.join(possible)}]"
        )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_meant(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _own_tensors(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
