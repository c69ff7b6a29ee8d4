"""Refuses a model that kdmesh would run otherwise than transformers does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.images import after_first_token, noise_image
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader
from kdmesh.models.images.vision import attention_of, has_axes
from kdmesh.models.packing import PackedTokens, pack
from kdmesh.models.positions import stated_limit
from kdmesh.models.recurrent import RECURRENT_LAYERS, RECURRENT_TYPES
from kdmesh.models.routing import steady_routing
from kdmesh.types import TokenSequence

_WINDOW = 3  # tokens; less than the sequences that are compared have

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "mlp", "moe"})

# However a model breaks that was written for another attention.
_FAILURES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ConfigError)

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BITS = 0.1
"""Largest relative error, |a - b| / |b| over all values. Rounding makes 1e-6 and 1e-2, a neighbour's tokens 0.8."""


def check_layer_types(config: PretrainedConfig, path: Path) -> None:
    """Refuses layers that are neither attention nor known to begin anew with a sequence, before anything is read.

    Args:
        config: of the model in directory `path`.

    Raises:
        ConfigError: naming the model type and the types of layers.
    """
    text = config.get_text_config()
    known = _LAYER_TYPES | (RECURRENT_TYPES if text.model_type in RECURRENT_LAYERS else frozenset())
    other = set(getattr(text, "layer_types", None) or []) - known
    if other:
        what = f"it has layers of type {sorted(other)}; known are {sorted(known)}"
        raise ConfigError(f"model type {config.model_type} of {path} is not supported: {what}")


def check_packing(model: PreTrainedModel) -> None:
    """Compares two short sequences in one packed row with each alone under transformers' own attention.

    Refuses what ignores our attention, keeps a state between tokens, attends to the
    future, or needs a feature that packed attention lacks. Costs three short forwards; with sliding windows six, as
    none is longer than those.

    Raises:
        ConfigError: naming the model type and the error found.
    """
    _check_alone_and_together(model, "two sequences in one row and each alone give hidden states")
    with _short_windows(model) as windows:
        if windows:
            what = f"with sliding windows of {_WINDOW} tokens in place of {', '.join(map(str, sorted(windows)))}, "
            _check_alone_and_together(model, f"{what}two sequences in one row and each alone give hidden states")


def _check_alone_and_together(model: PreTrainedModel, what: str) -> None:
    sequences = _probe_sequences(model)
    try:
        with torch.no_grad(), steady_routing(model):
            together_TD = hidden_states_TD(model, pack(sequences).to(model.device))
            with _own_attention(model):
                alone_TD = torch.cat([_own_hidden_TD(model, pack([s]).to(model.device)) for s in sequences])
    except ConfigError as error:
        raise _refusal(model, str(error)) from error
    except _FAILURES as error:
        reason = f"its code does not run with packed attention ({type(error).__name__}: {error})"
        raise _refusal(model, reason) from error
    _check_close(model, together_TD, alone_TD, what)


def check_head(model: PreTrainedModel) -> None:
    """Compares the model's own logits with those rebuilt from its hidden states and `output_head`.

    Raises:
        ConfigError: naming the model type and the error found.
    """
    packed = pack(_probe_sequences(model)[:1]).to(model.device)
    with torch.no_grad(), _own_attention(model):
        own_TV = model(input_ids=packed.token_ids_T[None], use_cache=False).logits[0]
        rebuilt_TV = output_head(model).logits(_own_hidden_TD(model, packed))
    _check_close(model, rebuilt_TV, own_TV, "its own logits and those rebuilt from its output head are")


def check_training(model: PreTrainedModel) -> None:
    """Runs a short forward in training mode, in which dropout of the attention shows; torch's random state is kept.

    Args:
        model: on the CPU.

    Raises:
        ConfigError: naming the model's directory, the error found, and what of config.json it comes from.
    """
    text = model.config.get_text_config().to_dict()
    keys = [name for name, value in text.items() if "att" in name and "drop" in name and value]
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            hidden_states_TD(model, pack(_probe_sequences(model)).to(model.device))
    except _FAILURES as error:
        found = f" ({', '.join(keys)} in config.json)" if keys else ""
        raise ConfigError(f"{model.name_or_path} cannot be trained: {error}{found}") from error
    finally:
        model.eval()


def check_images(model: PreTrainedModel, reader: ImageReader) -> None:
    """Compares two short sequences with images in one packed row with each alone, as transformers runs it.

    Raises:
        ConfigError: naming the model type and the error found.
    """
    sequences = [
        after_first_token(noise_image(32 * size, 48, seed=size), sequence.token_ids, reader)
        for size, sequence in enumerate(_probe_sequences(model), 2)
    ]
    packer = Packer(model, reader)
    try:
        with torch.no_grad():
            together_TD = hidden_states_TD(model, packer.pack(sequences).to(model.device))
            with _own_attention(model):
                alone_TD = torch.cat([_own_image_hidden_TD(model, packer.pack([s])) for s in sequences])
    except _FAILURES as error:
        raise _refusal(model, f"{type(error).__name__}: {error}") from error
    _check_close(model, together_TD, alone_TD, "two sequences with images in one row and each alone give hidden states")


def _own_image_hidden_TD(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    """Of one sequence with an image, at positions that the model finds by itself."""
    packed = packed.to(model.device)
    images = packed.images
    assert images is not None
    ids_1T = packed.token_ids_T[None]
    types = {"mm_token_type_ids": (ids_1T == model.config.image_token_id).int()} if has_axes(model.config) else {}
    output = model.base_model(input_ids=ids_1T, use_cache=False, **images.inputs, **types)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[set[int]]:
    """Sliding windows of _WINDOW tokens, as long as it lasts; those of the model that its sequences can be longer than.

    Some layers take theirs from the configuration, and some have it themselves.
    """
    config = model.config.get_text_config()
    longest = stated_limit(config) or sys.maxsize
    held = [(module, vars(module).get("sliding_window")) for module in model.modules()]
    held.append((config, getattr(config, "sliding_window", None)))
    long = [(holder, window) for holder, window in held if type(window) is int and _WINDOW < window < longest]
    for holder, _ in long:
        holder.sliding_window = _WINDOW
    try:
        yield {window for _, window in long}
    finally:
        for holder, window in long:
            holder.sliding_window = window


def _probe_sequences(model: PreTrainedModel) -> list[TokenSequence]:
    """Fixed ids that differ from each other: torch's random state is left as it was."""
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    ids = (np.arange(1, 13, dtype=np.int64) * 7919 % vocabulary_size).astype(np.int32)
    return [TokenSequence(token_ids=part, positions=np.zeros(1, np.int32)) for part in np.split(ids, [7])]


def _own_hidden_TD(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    hidden_TD: Tensor = model.get_decoder()(input_ids=packed.token_ids_T[None], use_cache=False).last_hidden_state[0]
    return hidden_TD


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation(attention_of(model.config, "eager"))
    try:
        yield
    finally:
        model.set_attn_implementation(attention_of(model.config))


def _check_close(model: PreTrainedModel, actual: Tensor, expected: Tensor, what: str) -> None:
    if not expected.isfinite().all():
        raise ConfigError(f"{model.name_or_path} computes what is not finite; look at its weights")
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_16_BITS)
    if not error <= tolerance:  # NaN is refused too
        raise _refusal(model, f"{what} {error:.2g} apart, relative; at most {tolerance:g} is rounding")


def _refusal(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"model type {model.config.model_type} of {model.name_or_path} is not supported: {reason}")
