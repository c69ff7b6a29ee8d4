"""The tokenizers of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kdmesh.alignment.boundaries import BoundaryTokens
from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.errors import ConfigError
from kdmesh.models.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTokens:
    """What a teacher's tokenizer must be."""

    fingerprint: str
    size: int  # real tokens
    shared: SharedTokens | None  # with the student's tokenizer; None: it is the same
    boundaries: BoundaryTokens | None = None  # likewise, where the objective asks for them
    image_expansion: str = ""  # see VisionSpec; empty: the student reads no images


def load_fast_tokenizer(path: Path, *, whose: str = "student") -> PreTrainedTokenizerFast:
    """The tokenizer in directory `path`; nothing is downloaded and no code of the directory is run.

    Raises:
        ConfigError: there is none, or not a fast one: loss positions are found by character
            offsets, which only those have.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ConfigError(f"no tokenizer in {path}; the {whose} needs one to read the data")
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not (path / "tokenizer.json").is_file():
        raise ConfigError(f"the tokenizer in {path} is not a fast one; it needs a tokenizer.json")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of real tokens: one more than the highest id. Rows of a head from there on are padding."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return max(vocabulary.values()) + 1
