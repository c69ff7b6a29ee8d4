"""Causal language models, from a directory to hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kdmesh.errors import ConfigError
from kdmesh.models.attention import PACKED_ATTENTION
from kdmesh.models.directory import check_model_directory, read_config
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.images.vision import attention_of, auto_class
from kdmesh.models.quiet import quiet
from kdmesh.models.recurrent import begin_with_every_sequence
from kdmesh.models.verify import check_head, check_layer_types, check_packing

__all__ = ["empty_causal_lm", "hidden_states_TD", "load_causal_lm", "without_memory"]

# What transformers raises for files that do not fit together; the message is its own.
_LOAD_ERRORS = (
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_causal_lm(
    path: Path,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
) -> PreTrainedModel:
    """The causal LM in directory `path`, in eval mode, checked to keep packed sequences apart.

    Args:
        path: a Hugging Face model directory with safetensors weights.
        dtype: of the parameters; auto keeps the checkpoint's own.
        device: where the parameters lie.
        weights: random ignores the checkpoint's weights for the architecture's own
            initialisation, drawn from torch's global generator on the CPU: seed it first.

    Raises:
        ConfigError: the directory is not such a model, or the model cannot be run over
            packed sequences; the message names the path and the rule.
    """
    check_model_directory(path, needs_weights=weights == "pretrained")
    config = read_config(path)
    with _refusing(path, "loaded"):
        check_layer_types(config, path)
        model = _read(path, config, dtype) if weights == "pretrained" else _initialise(config, dtype)
        begin_with_every_sequence(model)
    model = model.to(device).eval()
    check_packing(model)
    check_head(model)
    return model


def without_memory() -> FakeTensorMode:
    """Inside, tensors are made without memory, but for constants that some families make by means of their own."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def empty_causal_lm(path: Path) -> PreTrainedModel:
    """The architecture of directory `path` in float32 and eval mode, for a caller in `without_memory`: no weights.

    Raises:
        ConfigError: the directory is not a model that transformers builds.
    """
    config = read_config(path)
    # Values of tensors without memory cannot be drawn, and some towers look at what they have drawn.
    with _refusing(path, "built"), no_init_weights():
        check_layer_types(config, path)
        model = _initialise(config, torch.float32, moves=False).eval()
        model.tie_weights()  # which is left out with the initialisation
        begin_with_every_sequence(model)
    return model


@contextmanager
def _refusing(path: Path, done: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except _LOAD_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and PACKED_ATTENTION in error.args:  # looked up in a table of its own
            reason = "its model type knows its own attentions alone, and packed attention is none of them"
        raise ConfigError(f"{path} cannot be {done}: {reason}") from error


def _read(path: Path, config: PretrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") in ("mxfp4", "compressed-tensors"):
        # Else transformers keeps them on GPUs, where they cannot be trained, and asks for accelerate elsewhere; or it
        # unpacks them when the whole model is called, of which the body is called alone.
        quantization["dequantize"] = True
    groups = quantization.get("config_groups") or {}
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        raise ValueError("its quantization_config has input_activations, and activations are not rounded here")
    model, report = auto_class(config).from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attention_of(config),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report names them
    )
    _refuse_partial(path, report)
    return model


def _refuse_partial(path: Path, report: dict[str, Any]) -> None:
    """A tensor that was not read stays random, and one without a place is lost: neither is a smaller problem."""
    for kind in ("missing", "unexpected"):
        names = sorted(report[f"{kind}_keys"])
        if names:
            raise ConfigError(
                f"{path} has {len(names)} {kind} tensors, and every tensor must have its place: {', '.join(names[:5])}"
            )
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ConfigError(f"{path} has a tensor {name} of shape {tuple(found)}; its config.json says {tuple(wanted)}")


def _initialise(
    config: PretrainedConfig, dtype: torch.dtype | Literal["auto"], *, moves: bool = True
) -> PreTrainedModel:
    # In float32 whatever the dtype, so that one seed gives one model.
    model: PreTrainedModel = auto_class(config).from_config(
        config, dtype=torch.float32, attn_implementation=attention_of(config), trust_remote_code=False
    )
    if not moves:  # a tensor without memory cannot be replaced by one of another type
        return model
    return model.to((config.dtype or torch.float32) if dtype == "auto" else dtype)
