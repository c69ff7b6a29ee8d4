"""What Hugging Face transformers gives for the rows that a teacher is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
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
