"""Which tokens end a response."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TurnEncoder(Protocol):
    """Knows how a template ends an assistant turn."""

    def end_of_turn(self) -> int | None:
        """The special token that ends an assistant turn; None where there is none."""
        ...


def stop_token_ids(model: Path, tokenizer: PreTrainedTokenizerBase, encoder: TurnEncoder) -> tuple[int, ...]:
    """What ends a response: what ends an assistant turn in the data's template, and what ends the model's text."""
    ends = {encoder.end_of_turn(), tokenizer.eos_token_id, *_generation_ends(model / "generation_config.json")}
    found = tuple(sorted(end for end in ends if end is not None))
    if found:
        log.info("responses end with a token", extra={"stop_token_ids": list(found)})
    else:
        log.warning("nothing ends a response but its length: the tokenizer and the chat template name no end")
    return found


def _generation_ends(path: Path) -> Sequence[int]:
    """The ids in a generation_config.json that end a text, if there is such a file."""
    if not path.is_file():
        return ()
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return ends if isinstance(ends, list) else () if ends is None else (ends,)
