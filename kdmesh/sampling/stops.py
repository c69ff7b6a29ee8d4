"""Finds the token that completes a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens before the text that could hold a stop string: the first may be part of a character, or lose its space.
_MARGIN = 4


class StopStrings:
    """For one sample.

    Args:
        texts: what ends it; none of them empty.
        decode: ids to text, special tokens included.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._texts = tuple(texts)
        self._decode = decode
        # A token is at least one byte of what it stands for.
        self._window = max((len(text.encode()) for text in texts), default=0) + _MARGIN

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Whether the newest of the response's tokens has completed one; to be asked after each."""
        if not self._texts:
            return False
        tail = self._decode(token_ids[-self._window :])
        return any(text in tail for text in self._texts)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """A response's text up to the first of `stops` in it; all of it where there is none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]
