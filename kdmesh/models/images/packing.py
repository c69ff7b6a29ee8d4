"""Sequences with images laid end to end in one row, for a model that reads images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.images.vision import has_axes
from kdmesh.models.packing import PackedImages, PackedTokens, blank, pack
from kdmesh.types import Int32Array, TokenSequence

if TYPE_CHECKING:
    from kdmesh.models.images.reader import ImageReader  # which loads Pillow


class Packer:
    """Packs for one model. Sequences with and without images may share a row: each is as if it were alone."""

    def __init__(self, model: PreTrainedModel, reader: ImageReader | None, *, always_sees: bool = False) -> None:
        """
        Args:
            model: whose positions are wanted; its weights are not used.
            reader: the model's; None where it reads text alone.
            always_sees: let every row hold an image, a blank one if need be, so that the vision tower is run on
                every rank when it is on any.
        """
        self._model = model
        self._reader = reader
        self._always_sees = always_sees
        self._blank: tuple[Int32Array, Mapping[str, Tensor]] | None = None

    def pack(self, sequences: Sequence[TokenSequence]) -> PackedTokens:
        """One packed row on the CPU; without a sequence a blank one, for a rank that only joins the collectives.

        Raises:
            InvalidRequest: an image's file has changed, or its bytes are damaged.
        """
        packed = pack(sequences) if sequences else blank()
        images = [placed.image for sequence in sequences for placed in sequence.images]
        reader = self._reader
        if reader is None:
            assert not images
            return packed
        if images:
            inputs = reader.inputs([image for image in images if image is not None])
            positions_3T = None
            if has_axes(self._model.config):
                positions_3T = self._positions_3T(sequences, inputs["image_grid_thw"])
            return replace(packed, images=PackedImages(inputs=inputs, position_ids_3T=positions_3T))
        return self._with_blank_image(packed, reader) if self._always_sees else packed

    def _with_blank_image(self, packed: PackedTokens, reader: ImageReader) -> PackedTokens:
        """With one more sequence at the end: a small image and another token, which ask for no row."""
        if self._blank is None:
            self._blank = reader.blank()
        ids, inputs = self._blank
        length = len(ids) + 1
        position_ids_T = torch.cat([packed.position_ids_T, torch.arange(length)])
        positions_3T = position_ids_T.repeat(3, 1) if has_axes(self._model.config) else None
        return replace(
            packed,
            token_ids_T=torch.cat([packed.token_ids_T, torch.tensor([*ids.tolist(), 0])]),
            position_ids_T=position_ids_T,
            lengths=(*packed.lengths, length),
            images=PackedImages(inputs=inputs, position_ids_3T=positions_3T),
        )

    def _positions_3T(self, sequences: Sequence[TokenSequence], extents_N3: Tensor) -> Tensor:
        """Each sequence's own, as the model itself numbers them."""
        parts, first = [], 0
        for sequence in sequences:
            extents = extents_N3[first : first + len(sequence.images)]
            first += len(extents)
            parts.append(_positions_of(self._model, sequence, extents))
        return torch.cat(parts, dim=1)


def _positions_of(model: PreTrainedModel, sequence: TokenSequence, extents_N3: Tensor) -> Tensor:
    if not sequence.images:
        return torch.arange(sequence.num_tokens).repeat(3, 1)
    is_image_T = torch.zeros(sequence.num_tokens, dtype=torch.int32)
    for placed in sequence.images:
        is_image_T[placed.first_token : placed.end] = 1
    positions_31T, _ = model.base_model.get_rope_index(
        torch.from_numpy(sequence.token_ids).long()[None],
        mm_token_type_ids=is_image_T[None],
        image_grid_thw=extents_N3,
    )
    positions_3T: Tensor = positions_31T[:, 0]
    return positions_3T
