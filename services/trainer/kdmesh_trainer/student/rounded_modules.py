"""Which modules of a student compute with rounded matrices."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.checkpoint import stored_tensors
from kdmesh.models.directory import read_config
from kdmesh.models.element_types import parameters_in_float32
from kdmesh.models.images.vision import reads_images
from kdmesh.models.recurrent import is_recurrent
from kdmesh.parameter_names import is_meant, names_nothing
from kdmesh_trainer.student.fake_quantization import Rounding, compute_rounded
from kdmesh_trainer.student.linear_modules import linear_modules

if TYPE_CHECKING:
    from kdmesh_trainer.sections.quantization_config import QuantizationConfig

log = logging.getLogger(__name__)

# What engines multiply with as one matrix, which can only be rounded as one.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def check_rounding(
    config: QuantizationConfig | None, model: Path, compute_dtype: torch.dtype, *, written: str = "origin"
) -> None:
    """Return when modules of the model in this directory can be rounded and written as `config` says.

    Args:
        written: export.dtype.

    Raises:
        ConfigError: they cannot, what writes them is not installed, or the directory is no model.
    """
    # Not at the top: benchmarks of the GPU take a student apart without what loads one.
    from kdmesh.models.body import empty_causal_lm, without_memory

    if config is None:
        return
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"student.quantization needs compressed-tensors (pip install 'kdmesh[quantization]'): {error}"
        ) from error
    described = read_config(model)
    _refuse_kind(described, model)
    if getattr(described, "quantization_config", None) is not None:
        raise ConfigError(
            f"student.quantization does not begin from {model}, whose matrices are rounded already and would be "
            "rounded once more, to other numbers: begin from its masters, which export.matrices masters or both leaves"
        )
    if written == "origin" and described.dtype == torch.float16:
        raise ConfigError(
            f"export.dtype is origin and {model} has float16, which does not hold every scale of student.quantization: "
            "choose bfloat16 or float32"
        )
    with without_memory():
        names = modules_to_round(empty_causal_lm(model), config, compute_dtype)
    stored = stored_tensors(model)
    if others := [name for name in names if stored and f"{name}.weight" not in stored]:
        raise ConfigError(
            f"student.quantization: the files of {model} have another name for {others[0]}, by which engines would "
            "look for its rounded matrix"
        )


def round_modules(lm: PreTrainedModel, config: QuantizationConfig, compute_dtype: torch.dtype) -> None:
    """Have the modules that `config` means compute with rounded matrices, in place. Before `lm` is sharded.

    Raises:
        ConfigError: as modules_to_round.
    """
    names = modules_to_round(lm, config, compute_dtype)
    compute_rounded(lm, names, Rounding.of(config, compute_dtype))
    log.info("modules rounded", extra={"modules": len(names), "numbers": config.weights})


def modules_to_round(lm: PreTrainedModel, config: QuantizationConfig, compute_dtype: torch.dtype) -> list[str]:
    """Names of the linear modules of the body, but for those that are kept, and what is computed in float32.

    Raises:
        ConfigError: a pattern of `keep` means none of them, or what engines fuse is kept in part; none is left; groups
            do not divide the inputs of one; or the model has experts, which are no modules of their own.
    """
    wide = parameters_in_float32(lm, compute_dtype)
    linear = [name for name in linear_modules(lm) if lm.get_submodule(name).weight not in wide]
    for name, module in lm.named_modules():
        if any(parameter.ndim > 2 for parameter in module.parameters(recurse=False)):
            raise ConfigError(
                f"student.quantization rounds linear modules, and {name} of {lm.config.model_type} holds matrices of "
                "several experts in one tensor"
            )
    for pattern in config.keep:
        if not any(is_meant(pattern, f"{name}.weight") for name in linear):
            told = names_nothing(pattern, [f"{name}.weight" for name in linear])
            raise ConfigError(f"student.quantization.keep: of the linear modules of the body {told}")
    rounded = [name for name in linear if not any(is_meant(pattern, f"{name}.weight") for pattern in config.keep)]
    if not rounded:
        raise ConfigError(f"student.quantization leaves no linear module of {lm.config.model_type} to round")
    _refuse_parts(linear, rounded)
    for name in rounded:
        inputs = cast(nn.Linear, lm.get_submodule(name)).in_features
        if config.group_size is not None and inputs % config.group_size:
            raise ConfigError(
                f"student.quantization.group_size is {config.group_size}, and {name} has {inputs} inputs, which it "
                "does not divide"
            )
    return rounded


def _refuse_kind(config: PretrainedConfig, path: Path) -> None:
    if is_recurrent(config):
        raise ConfigError(
            f"student.quantization does not go with layers that carry a state from token to token, which {path} has: "
            "their kernels read matrices past their modules"
        )
    if reads_images(config):
        raise ConfigError(f"student.quantization needs a student of text alone, and {path} reads images")


def _refuse_parts(linear: Collection[str], rounded: Collection[str]) -> None:
    for together in _together(linear):
        kept = [name for name in together if name not in rounded]
        if 0 < len(kept) < len(together):
            raise ConfigError(
                f"student.quantization.keep has {', '.join(kept)} and not all of {', '.join(together)}, which engines "
                "hold as one matrix: keep all of them or none"
            )


def _together(linear: Collection[str]) -> Iterator[list[str]]:
    parents = dict.fromkeys(name.rpartition(".")[0] for name in linear)
    for parent in parents:
        for names in _FUSED:
            yield [name for last in names if (name := f"{parent}.{last}") in linear]
