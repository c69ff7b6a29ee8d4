"""What the tokens of a vocabulary stand for, in bytes."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from kdmesh.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """By token id; None for special tokens and for ids that no token has.

    Tokens of a byte-level BPE or of SentencePiece (with or without byte tokens), one after the other, are the text,
    but for what the tokenizer normalises and for a space that it puts in front. Tokens of WordPiece leave out the
    spaces between words; see `Spans`.

    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = tokenizer.added_tokens_decoder
    read = _reader(backend)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)  # more than tokens where no token has some id
    for token, number in vocabulary.items():
        if number in added:
            found[number] = None if added[number].special else added[number].content.encode()
        else:
            found[number] = read(token)
    return found


def _reader(backend: dict[str, Any]) -> Any:
    kinds = set(_kinds(backend))
    if "ByteLevel" in kinds:
        return _of_byte_level
    if backend["model"]["type"] == "WordPiece":
        prefix = backend["model"]["continuing_subword_prefix"]
        return lambda token: token.removeprefix(prefix).encode()
    if "Metaspace" in kinds or "ByteFallback" in kinds or _SPACE in json.dumps(backend, ensure_ascii=False):
        return _of_sentence_piece
    raise ConfigError(
        f"a tokenizer with model {backend['model']['type']} and the parts {', '.join(sorted(kinds)) or 'none'} cannot "
        "be aligned with another: byte-level BPE, SentencePiece and WordPiece can"
    )


def _kinds(part: Any) -> list[str]:
    """Types of all pre-tokenizers and decoders, however deep."""
    if isinstance(part, list):
        return [kind for item in part for kind in _kinds(item)]
    if not isinstance(part, dict):
        return []
    own = [part["type"]] if isinstance(part.get("type"), str) else []
    inner = [part.get(key) for key in ("pre_tokenizer", "decoder", "pretokenizers", "decoders")]
    return own + [kind for item in inner for kind in _kinds(item)]


def _of_byte_level(token: str) -> bytes:
    table = _byte_level_table()
    return bytes(table[character] for character in token)


def _of_sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte.group(1), 16)]) if byte else token.replace(_SPACE, " ").encode()


@cache
def _byte_level_table() -> dict[str, int]:
    """The character that a byte-level BPE writes each byte as: itself where it is printable, else one above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
