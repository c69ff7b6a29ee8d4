"""Finds the tokens of an assistant turn in a rendered chat, or says why that cannot be done."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kdmesh.types import Image


class Reason(StrEnum):
    """Why a chat cannot be trained on."""

    NO_ASSISTANT = "no assistant turn"
    UNTRAINED = "no assistant turn is to be trained on"
    EMPTY = "empty assistant turn"
    NO_TEXT = "a text with nothing to predict"
    NO_PROMPT = "begins with an assistant turn"
    TEMPLATE = "refused by the chat template"
    NO_TOOLS = "the chat template leaves out tools"
    NO_CALLS = "the chat template leaves out calls of tools"
    NO_REASONING = "the chat template leaves out the reasoning"
    NOT_A_PREFIX = "the prompt is not a prefix of the rendered chat"
    RETOKENISED = "the tokens of a prompt change when its turn follows"
    CHANGED = "a later turn changes how an assistant turn is rendered"
    IMAGES = "its images do not fit its tokens"
    OTHER_RESPONSE = "the teacher would read another response"
    OTHER_PROMPT = "the teacher would be prompted for another turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A chat, or one rendering of it, that cannot be trained on."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedTurn:
    """An assistant turn as the template renders it while it is the last one."""

    prompt: str  # everything before it, generation prompt included
    text: str  # everything up to it, itself included
    content: str
    images: tuple[Image, ...]  # of what comes before it
    has_calls: bool  # whether it calls tools behind its content, perhaps in special tokens
    plain_end: int | None  # if so: the special token that ends turns without calls; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """A text and its tokens; the offsets cover every character that a token stands for."""

    text: str
    ids: list[int]
    begins: list[int]  # character offset of each token
    ends: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What must be known of a tokenizer."""

    special: frozenset[int]  # ids of special tokens
    added: frozenset[int]  # ids that split the text before anything else does
    encode: Callable[[str], list[int]]  # adds nothing to the text


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTokens:
    """The tokens a turn consists of, the one that ends it included."""

    tokens: range  # at least one
    ends_in_special: bool  # False: the template has no end-of-turn token


def find_turn(encoded: EncodedText, turn: RenderedTurn, vocabulary: Vocabulary) -> TurnTokens | Unusable:
    """The turn's tokens in a rendering of the same chat, which may go on after the turn."""
    text, start = encoded.text, len(turn.prompt)
    if not text.startswith(turn.prompt):
        at = common_length(text, turn.prompt)
        detail = f"the prompt goes on {turn.prompt[at : at + 40]!r}, the chat {text[at : at + 40]!r}"
        return Unusable(reason=Reason.NOT_A_PREFIX, detail=detail)
    first = bisect_right(encoded.ends, start)
    if first == 0:
        return Unusable(reason=Reason.NO_PROMPT, detail="the template renders nothing before it")
    if not _prompt_is_whole(encoded, start, first, vocabulary):
        return Unusable(reason=Reason.RETOKENISED, detail=f"around {text[max(0, start - 20) : start + 20]!r}")
    last, is_special = _last_token(encoded, turn, vocabulary.special)
    if last < first:
        detail = f"{turn.text[start : start + 40]!r} became {text[start : start + 40]!r}"
        return Unusable(reason=Reason.CHANGED, detail=detail)
    return TurnTokens(tokens=range(first, last + 1), ends_in_special=is_special)


def _prompt_is_whole(encoded: EncodedText, start: int, first: int, vocabulary: Vocabulary) -> bool:
    """Whether the tokens before `first` are those of the text before `start` by itself.

    A boundary at `start` is not enough: how a tokenizer splits "\\n\\n" may depend on whether text
    follows. Tokens before an added token cannot depend on what comes after it, so only the
    rest is encoded again.
    """
    split = next((k for k in range(first - 1, 0, -1) if encoded.ids[k] in vocabulary.added), 0)
    return vocabulary.encode(encoded.text[encoded.begins[split] : start]) == encoded.ids[split:first]


def _last_token(encoded: EncodedText, turn: RenderedTurn, special: frozenset[int]) -> tuple[int, bool]:
    """The token that ends the turn, or -1 when it cannot be found, and whether it is a special one."""
    # Looked for after the content, which may hold special tokens of its own.
    content, start = turn.content.strip(), len(turn.prompt)
    agreed = common_length(encoded.text, turn.text)
    at = encoded.text.find(content, start, agreed)
    ends = _end_tokens(encoded, start if at < 0 else at + len(content), agreed, special)
    plain_end = len(turn.text.rstrip())
    is_complete = plain_end <= agreed
    if ends and (is_complete or (at >= 0 and not turn.has_calls)):
        return _end_token(encoded, turn, ends), True
    if not is_complete:
        return -1, False
    # Space that the template adds is not part of the turn, space of the content is.
    at = encoded.text.find(turn.content, start, agreed)
    content_end = 0 if at < 0 else at + len(turn.content)
    return bisect_left(encoded.begins, max(plain_end, content_end)) - 1, False


def _end_token(encoded: EncodedText, turn: RenderedTurn, ends: Sequence[int]) -> int:
    """Which of the special tokens at the end of a turn, in their order, is the last that a model says.

    The first, because some templates end the last turn twice (end of turn, end of text). Calls of tools may end in
    special tokens of their own: then the one that ends other turns, too, or the last.
    """
    if not turn.has_calls:
        return ends[0]
    return next((token for token in ends if encoded.ids[token] == turn.plain_end), ends[-1])


def _end_tokens(encoded: EncodedText, lower: int, upper: int, special: frozenset[int]) -> list[int]:
    """The special tokens that, with nothing but space between them, end text[lower:upper]."""
    found: list[int] = []
    for token in range(bisect_right(encoded.ends, upper) - 1, -1, -1):
        if encoded.begins[token] < lower:
            break
        if encoded.ids[token] in special:
            found.insert(0, token)
        elif encoded.text[encoded.begins[token] : encoded.ends[token]].strip():
            break
    return found


def common_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
