"""Packed rows with images give each sequence what transformers gives it alone."""

from __future__ import annotations

import pytest
import torch

from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.images.packing import Packer
from tests.support.reference_vision import hugging_face_vision_rows
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_vision import FAMILIES, TinyVisionModels, png, reader_of, vision_sequence

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", [*FAMILIES, *ROW_FAMILIES])
def test_a_packed_row_with_images_gives_each_sequence_its_own_rows(tiny_vision: TinyVisionModels, family: str) -> None:
    path = tiny_vision.path(family)
    reader = reader_of(path)
    sequences = [
        vision_sequence(reader, 5, png(24, 40, seed=1), 9, png(16, 16, seed=2), 7, seed=1),
        vision_sequence(reader, 11, seed=2),
        vision_sequence(reader, png(64, 48, seed=3), 6, seed=3),
    ]
    model = load_causal_lm(path, torch.float32, CPU)
    packed = Packer(model, reader).pack(sequences)
    with torch.no_grad():
        rows_RD = hidden_states_TD(model, packed).index_select(0, packed.rows_R)
    torch.testing.assert_close(rows_RD, hugging_face_vision_rows(path, sequences), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", *ROW_FAMILIES])
def test_a_blank_image_changes_no_row(tiny_vision: TinyVisionModels, family: str) -> None:
    path = tiny_vision.path(family)
    reader = reader_of(path)
    sequences = [vision_sequence(reader, 11, seed=2), vision_sequence(reader, 7, seed=3)]
    model = load_causal_lm(path, torch.float32, CPU)
    rows = []
    for always_sees in (False, True):
        packed = Packer(model, reader, always_sees=always_sees).pack(sequences)
        assert (packed.images is not None) == always_sees
        if packed.images is not None and (positions_3T := packed.images.position_ids_3T) is not None:
            assert positions_3T.is_contiguous()  # memory that several elements share could not be written to
        with torch.no_grad():
            rows.append(hidden_states_TD(model, packed).index_select(0, packed.rows_R))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-5)
