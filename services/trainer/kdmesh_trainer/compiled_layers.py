"""Decoder layers compiled by torch.compile, once for every length of a micro-batch."""

from __future__ import annotations

import os
import shutil

import torch
from transformers import AttentionInterface, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.attention import PACKED_ATTENTION, packed_attention
from kdmesh_trainer.model import decoder_layers


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

    What lies around attention is compiled; attention itself runs as it does otherwise, because it depends on how many
    sequences a row has, and would be compiled for each number of them.
    """
    uncompiled = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(PACKED_ATTENTION, uncompiled)
    for layer in decoder_layers(lm):
        # The method, not the module: its hooks, which are FSDP's, stay outside.
        layer.forward = torch.compile(layer.forward, dynamic=True)
