"""Causal language models from a directory, run up to their final norm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.packing import PackedTokens


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
    raise NotImplementedError(path, dtype, device, weights)


def hidden_states_TD(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    """[T, D] hidden states after the final norm, each sequence as if it were alone; the lm_head does not run.

    Carries gradients when autograd records. When `model` is sharded by FSDP, call this from inside
    its root module's forward. `packed` lies on the model's device.
    """
    output = model.get_decoder()(
        input_ids=packed.token_ids_T[None],
        position_ids=packed.position_ids_T[None],
        use_cache=False,
        packed_lengths=packed.lengths,
    )
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD
