"""Which bytes of a text each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdmesh.types import Int32Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spans:
    """Tokens of a text and the bytes that each stands for; bytes between two tokens belong to the second."""

    token_ids: Int32Array  # [N]
    ends: Int32Array  # [N] not falling; token n stands for the bytes from ends[n - 1] (0 for the first) to ends[n]


def spans_of_ids(token_ids: Int32Array, table: Sequence[bytes | None]) -> tuple[Spans, bytes]:
    """Of tokens whose bytes are the text one after the other, and that text; special tokens stand for none.

    This is how ids that were sampled are read: no tokenizer need make the same ids of their text.
    """
    pieces = [table[number] or b"" if number < len(table) else b"" for number in token_ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int32)
    return Spans(token_ids=token_ids, ends=ends), b"".join(pieces)


def spans_of_text(tokenizer: PreTrainedTokenizerFast, text: str, table: Sequence[bytes | None]) -> Spans:
    """Of the tokens that the tokenizer makes of `text`, without any that it adds.

    Ends are those of the tokenizer's own offsets, so they hold whatever it normalises. Of several tokens within one
    character, each but the last ends after as many bytes as it has.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    byte_at = np.zeros(len(text) + 1, dtype=np.int32)
    np.cumsum([len(character.encode()) for character in text], out=byte_at[1:])
    ends = np.empty(len(ids), dtype=np.int32)
    last = 0
    for n, (begin, end) in enumerate(encoded["offset_mapping"]):
        ends[n] = last = max(last, int(byte_at[end]))
        follows = encoded["offset_mapping"][n + 1] if n + 1 < len(ids) else None
        if follows is not None and follows[0] < end:  # the character is not over
            before = int(ends[n - 1]) if n else 0
            piece = table[int(ids[n])]
            begun = max(before, int(byte_at[begin]))
            ends[n] = last = min(begun + len(piece or b""), int(byte_at[end]))
    return Spans(token_ids=ids, ends=ends)
