"""Decoder layers compiled by torch.compile, for every length of a micro-batch at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.attention import PACKED_ATTENTION, packed_attention
from kdmesh_trainer.student.model import decoder_layers


def check_compiler(*, on_gpu: bool) -> None:
    """Return when torch.compile finds the compiler that it calls.

    Raises:
        ConfigError: it is not installed.
    """
    variable, default = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    compiler = os.environ.get(variable, default)
    if shutil.which(compiler) is None:
        device = "GPU" if on_gpu else "CPU"
        raise ConfigError(
            f"student.compile layers needs a compiler on a {device}, and there is no {compiler} on the PATH; install "
            f"it (Debian: {default}), or name one in the environment variable {variable}"
        )


def compile_layers(lm: PreTrainedModel) -> None:
    """Compile the forward and backward pass of every decoder layer, in place. Before they are sharded.

    Where one call attends to all sequences, a layer is compiled in one piece. Else what lies around attention is;
    attention itself runs as it does otherwise, because it depends on how many sequences a row has, and would be
    compiled for each number of them.
    """
    AttentionInterface.register(PACKED_ATTENTION, _attention)
    for layer in decoder_layers(lm):
        # The method, not the module: its hooks, which are FSDP's, stay outside.
        layer.forward = _with_lengths_hidden(torch.compile(layer.forward, dynamic=True))


class _Hidden:
    """What compiled code hands on without a look: of a tuple it would hold the length to be always the same.

    Not a dataclass: torch 2.11 looks into those that are frozen.
    """

    __slots__ = ("packed_lengths",)

    def __init__(self, packed_lengths: tuple[int, ...]) -> None:
        self.packed_lengths = packed_lengths


def _with_lengths_hidden(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def hiding(*args: Any, packed_lengths: tuple[int, ...] | None = None, **kwargs: Any) -> Tensor:
        if packed_lengths is None:  # of a vision tower, which sees each image apart
            return forward(*args, **kwargs)
        if kwargs.get("packed_starts") is not None:
            return forward(*args, packed_lengths=(), packed_longest=max(packed_lengths), **kwargs)
        return forward(*args, packed_lengths=_Hidden(packed_lengths), **kwargs)

    return hiding


def _attention(*args: Any, packed_lengths: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """For layers that are compiled, and for those of other models in this process."""
    if isinstance(packed_lengths, _Hidden):
        attended: tuple[Tensor, None] = _not_compiled(*args, **{**kwargs, "hidden": packed_lengths})
        return attended
    return packed_attention(*args, **{**kwargs, "packed_lengths": packed_lengths})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _not_compiled(*args: Any, hidden: _Hidden, **kwargs: Any) -> tuple[Tensor, None]:
    return packed_attention(*args, **{**kwargs, "packed_lengths": hidden.packed_lengths})
