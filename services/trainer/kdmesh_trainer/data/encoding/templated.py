"""Tokenizers of student and teacher, each with the chat template that a configuration gives it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kdmesh.chats.chat_template import TemplateSetting, with_settings
from kdmesh_trainer.data.encoding.chat import read_template, template_of
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.sections.data_config import DataConfig, OtherTokenizer


def student_tokenizer(model: Path, data: DataConfig) -> PreTrainedTokenizerFast:
    """That in directory `model`, with the chat template that is trained with, so that the model is written with it.

    Raises:
        ConfigError: it cannot be loaded, or its template lacks what is to be set.
    """
    return _templated(load_fast_tokenizer(model), data.chat_template, data.chat_template_settings, key="data")


def teacher_tokenizer(other: OtherTokenizer) -> PreTrainedTokenizerFast:
    """The teacher's where it is another one. Raises ConfigError as `student_tokenizer`."""
    return _templated(
        load_fast_tokenizer(other.path, whose="teacher"),
        other.chat_template,
        other.chat_template_settings,
        key="data.teacher_tokenizer",
    )


def _templated(
    tokenizer: PreTrainedTokenizerFast, path: Path | None, settings: Mapping[str, TemplateSetting], *, key: str
) -> PreTrainedTokenizerFast:
    if path is not None:
        tokenizer.chat_template = read_template(path)
    if settings:
        template = template_of(tokenizer)
        tokenizer.chat_template = with_settings(template, settings, key=f"{key}.chat_template_settings")
    return tokenizer
