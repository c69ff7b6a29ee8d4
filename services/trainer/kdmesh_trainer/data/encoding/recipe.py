"""What makes the encoder of a job, so that every process can make it, and can tell whether another's is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import transformers

from kdmesh.images import ImageTokens
from kdmesh_trainer.data.encoding.chat import ChatEncoder, read_template
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.plain_text import TextEncoder
from kdmesh_trainer.data.encoding.teacher_context import ContextEncoder, build_encoder
from kdmesh_trainer.data.encoding.templated import student_tokenizer, teacher_tokenizer
from kdmesh_trainer.sections.data_config import DataConfig, TeacherTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encoder = ChatEncoder | ContextEncoder | OtherTokenizerEncoder | TextEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """Plain values that an encoder follows from."""

    student: Path  # directory of its tokenizer
    data: DataConfig
    takes_chunks: bool = False  # see OtherTokenizerEncoder

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The student's, with the chat template that is trained with. Raises ConfigError when it cannot be loaded."""
        return student_tokenizer(self.student, self.data)

    def encoder(self, tokenizer: PreTrainedTokenizerFast, images: ImageTokens | None = None) -> Encoder:
        """What reads the data.

        Args:
            tokenizer: of `tokenizer`.
            images: how the student reads them; None where it reads text alone.

        Raises:
            ConfigError: a template is missing, or is not Jinja.
        """
        return build_encoder(tokenizer, self.data, takes_chunks=self.takes_chunks, images=images)

    def ingredients(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """What tokens depend on beside the chats, as plain values; `tokenizer` is that of `tokenizer`."""
        other, context = self.data.teacher_tokenizer, self.data.teacher_context
        theirs = {} if other is None else _of_tokenizer(teacher_tokenizer(other))
        told = None if context is None else context.model_dump(mode="json", exclude={"path"})
        if isinstance(context, TeacherTemplate):
            told = {**(told or {}), "template_file": read_template(context.path)}
        return {
            "student": _of_tokenizer(tokenizer),
            "teacher": theirs,
            "teacher_context": told,
            "takes_chunks": self.takes_chunks,
            "made_by": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        }


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Mapping[str, Any]:
    return {
        "tokenizer (digest)": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "special_ids": sorted(tokenizer.all_special_ids),
    }
