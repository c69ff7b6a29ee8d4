"""What Hugging Face transformers gives for the rows that a teacher is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kdmesh.types import TokenSequence


def hugging_face_rows(
    path: Path, sequences: Sequence[TokenSequence], *, dtype: torch.dtype | Literal["auto"] = "auto"
) -> Tensor:
    """[R, D] last hidden states after the final norm, every sequence computed alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            ids_1T = torch.from_numpy(sequence.token_ids).long()[None]
            hidden_TD = model.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            rows.append(hidden_TD[torch.from_numpy(sequence.positions).long()])
    return torch.cat(rows)


def hugging_face_layers(path: Path, sequences: Sequence[TokenSequence], layers: Sequence[int]) -> Tensor:
    """[R, layers * D] what these layers, counted from 1, give, every sequence computed alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
    outputs = kept_outputs(model.model.layers, layers)
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            model.model(input_ids=torch.from_numpy(sequence.token_ids).long()[None], use_cache=False)
            wanted_R = torch.from_numpy(sequence.positions).long()
            rows.append(torch.cat([outputs[layer][wanted_R] for layer in layers], 1))
    return torch.cat(rows)


def kept_outputs(row: nn.ModuleList, layers: Sequence[int]) -> dict[int, Tensor]:
    """Filled by every forward pass of one sequence: by layer, counted from 1, [T, D] what it gives."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[layer] = (output if isinstance(output, Tensor) else output[0])[0]

    for layer in layers:
        row[layer - 1].register_forward_hook(partial(keep, layer))
    return outputs
