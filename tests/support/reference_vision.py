"""What Hugging Face transformers gives for sequences with images, each computed alone by the model's own forward."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

from kdmesh.types import TokenSequence
from tests.support.reference_rows import kept_outputs
from tests.support.row_families import ROW_FAMILIES


def hugging_face_model(path: Path, dtype: torch.dtype | Literal["auto"] = "auto") -> Any:
    """The model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def hugging_face_inputs(path: Path, sequence: TokenSequence) -> dict[str, Tensor]:
    """Arguments of the model's forward: ids, and the image processor's own tensors."""
    ids_1T = torch.from_numpy(sequence.token_ids).long()[None]
    if not sequence.images:
        return {"input_ids": ids_1T}
    pictures = []
    for placed in sequence.images:
        assert placed.image is not None
        data = placed.image.data if isinstance(placed.image.data, bytes) else placed.image.data.read_bytes()
        pictures.append(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    config = AutoConfig.from_pretrained(path)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    if (made := ROW_FAMILIES.get(config.model_type)) is not None:
        read = processor(images=pictures, return_tensors="pt", **made.told)
        return {"input_ids": ids_1T, **{name: value for name, value in read.items() if name in made.inputs}}
    types = torch.zeros_like(ids_1T, dtype=torch.int32)
    for placed in sequence.images:
        types[0, placed.first_token : placed.end] = 1
    return {"input_ids": ids_1T, "mm_token_type_ids": types, **processor(images=pictures, return_tensors="pt")}


def hugging_face_vision_rows(
    path: Path,
    sequences: Sequence[TokenSequence],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    layers: Sequence[int] = (),
) -> Tensor:
    """[R, (1 + layers) * D] last hidden states after the final norm, and what these layers, counted from 1, give."""
    model = hugging_face_model(path, dtype)
    outputs = kept_outputs(model.get_decoder().layers, layers)
    rows = []
    with torch.no_grad():
        for sequence in sequences:
            hidden_TD = model.model(**hugging_face_inputs(path, sequence), use_cache=False).last_hidden_state[0]
            hidden_TC = torch.cat([hidden_TD, *(outputs[layer] for layer in layers)], 1)
            rows.append(hidden_TC[torch.from_numpy(sequence.positions).long()])
    return torch.cat(rows)
