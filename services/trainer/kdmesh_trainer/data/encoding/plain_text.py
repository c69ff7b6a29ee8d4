"""Turns plain texts into token ids, all of which carry loss, beside chats if there are any."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdmesh.chats.chat_rows import Chat
from kdmesh.images import ImageTokens
from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.encoding.turns import Reason, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NO_IMAGE = Unusable(reason=Reason.IMAGES, detail="a plain text writes the token that stands for images, and has none")


class TextEncoder:
    """Encodes plain texts, and has a ChatEncoder encode the chats among them.

    A text begins with what the tokenizer puts before texts, and ends with its end of text. Every token of it is
    predicted once, but for the first, which nothing comes before: a text that is too long becomes several sequences,
    each of which begins with the last token of the one before it, as context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_tokens: int,
        chats: ChatEncoder | None,
        images: ImageTokens | None,
    ) -> None:
        """
        Args:
            max_tokens: of a sequence, at least 2.
            chats: None where all is plain text, which needs no chat template.
            images: how the model reads them; None where it reads text alone.
        """
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._end: int | None = tokenizer.eos_token_id
        self._max_tokens = max_tokens
        self._chats = chats
        self._images = images

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each row its sequences, or why there are none."""
        texts = map(self._sequences, _texts(chats), self._encoded(chats))
        others = iter(() if self._chats is None else self._chats.encode(_others(chats)))
        return [next(others) if chat.text is None else next(texts) for chat in chats]

    def encode_prompts(self, chats: Sequence[Chat]) -> list[Prompt | Unusable]:
        """For each row what a response goes on from: a text, or a chat up to the assistant's turn."""
        texts = map(self._prompt, self._encoded(chats))
        others = iter(() if self._chats is None else self._chats.encode_prompts(_others(chats)))
        return [next(others) if chat.text is None else next(texts) for chat in chats]

    def end_of_turn(self) -> int | None:
        """As ChatEncoder; None where there are no chats."""
        return None if self._chats is None else self._chats.end_of_turn()

    def _encoded(self, chats: Sequence[Chat]) -> Iterator[list[int]]:
        """The tokens of each text, without the end."""
        for encoding in self._backend.encode_batch(_texts(chats), add_special_tokens=True):
            ids: list[int] = encoding.ids
            yield ids[:-1] if ids and ids[-1] == self._end else ids

    def _sequences(self, text: str, ids: list[int]) -> list[TokenSequence] | Unusable:
        whole = np.array(ids if self._end is None else [*ids, self._end], np.int32)
        if not text.strip() or len(whole) < 2:  # of an empty one the end alone would be learnt, behind BOS
            return Unusable(reason=Reason.NO_TEXT, detail=f"{len(ids)} tokens")
        if self._has_image_tokens(ids):
            return _NO_IMAGE
        begins = range(0, len(whole) - 1, self._max_tokens - 1)
        return [_all_of(whole[begin : begin + self._max_tokens]) for begin in begins]

    def _prompt(self, ids: list[int]) -> Prompt | Unusable:
        if not ids:
            return Unusable(reason=Reason.NO_PROMPT, detail="the text has no tokens")
        return _NO_IMAGE if self._has_image_tokens(ids) else Prompt(token_ids=np.array(ids, np.int32))

    def _has_image_tokens(self, ids: list[int]) -> bool:
        return self._images is not None and self._images.token_id in ids


def _all_of(token_ids: Int32Array) -> TokenSequence:
    return TokenSequence(token_ids=token_ids.copy(), positions=np.arange(len(token_ids) - 1, dtype=np.int32))


def _texts(chats: Sequence[Chat]) -> list[str]:
    return [chat.text for chat in chats if chat.text is not None]


def _others(chats: Sequence[Chat]) -> list[Chat]:
    return [chat for chat in chats if chat.text is None]
