"""What chosen decoder layers of a causal LM give while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.errors import ConfigError


def num_layers(config: PretrainedConfig) -> int:
    """Decoder layers of a model, by its configuration."""
    number: int = config.get_text_config().num_hidden_layers
    return number


def numbered_layers(lm: PreTrainedModel) -> dict[int, nn.Module]:
    """Its decoder layers by their numbers, which are counted from 1. Before the model is sharded.

    Empty where its decoder is not one row of layers.
    """
    number = num_layers(lm.config)
    kinds = set(lm._no_split_modules or ())
    rows = [
        part
        for part in lm.get_decoder().children()
        if isinstance(part, nn.ModuleList) and len(part) == number and {type(layer).__name__ for layer in part} <= kinds
    ]
    return dict(enumerate(rows[0], 1)) if len(rows) == 1 else {}


def chosen_layers(lm: PreTrainedModel, numbers: Collection[int]) -> dict[int, nn.Module]:
    """Some of them, in ascending order. Raises ConfigError when it has not all of these."""
    layers = numbered_layers(lm)
    if unknown := sorted(set(numbers) - layers.keys()):
        raise ConfigError(
            f"{lm.name_or_path} has no decoder layer {unknown[0]}; it has {len(layers)} that are numbered"
        )
    return {number: layers[number] for number in sorted(numbers)}


@contextmanager
def captured(layers: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Filled, by each forward pass of the model within the context, with [T, D] what these layers give it.

    That is the sum that the next layer reads, before any norm. It carries gradients when autograd records.
    """
    outputs: dict[int, Tensor] = {}

    def keep(number: int, module: nn.Module, args: Any, output: Any) -> None:
        outputs[number] = (output[0] if isinstance(output, tuple) else output)[0]

    with ExitStack() as stack:
        for number, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(keep, number)).remove)
        yield outputs
