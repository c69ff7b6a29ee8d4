"""A chat's turns as a prompt's ids, and an answer's ids as its text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kdmesh.answering.prompt_rows import Asked
from kdmesh.answering.source import image_column
from kdmesh.chats.chat_template import TEMPLATE_ERRORS, TemplateSetting, dated_alike, with_settings, with_texts
from kdmesh.chats.image_files import ImageColumn, NoImages
from kdmesh.chats.tool_rows import are_written
from kdmesh.errors import ConfigError, DataError, InvalidRequest, ModelMismatch
from kdmesh.images import expand_images
from kdmesh.models.ends import stop_token_ids
from kdmesh.models.images.reader import load_image_reader
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import Int32Array, PlacedImage, Sample, VisionSpec

_ANSWER = "that is so"


class ChatTokens:
    """Messages to a prompt's ids, and an answer's ids to its text.

    Raises, when made:
        ConfigError: the directory has no tokenizer, or one without a chat template, or without what is to be set in it.
    """

    def __init__(self, model: Path, template_settings: Mapping[str, TemplateSetting] | None = None) -> None:
        tokenizer = load_tokenizer(model) if model.is_dir() else None
        if tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(f"the tokenizer in {model} has no chat template") from None
        template = dated_alike(with_settings(template, template_settings or {}, key="--template-setting"))
        self._template = with_texts(template, tokenizer.apply_chat_template)
        self._model = model
        self._tokenizer = tokenizer
        self._reader = load_image_reader(model) if (model / "config.json").is_file() else None

    @property
    def ends(self) -> tuple[int, ...]:
        """What ends an answer, as where a trainer samples: the end of a turn, and of the model's text."""
        return stop_token_ids(self._model, self._tokenizer, self)

    def end_of_turn(self) -> int | None:
        """The special token that the template puts behind what an assistant says; None where there is none."""
        chat = [{"role": "user", "content": "what"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = str(self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False))
        except TEMPLATE_ERRORS:
            return None
        _, found, behind = text.rpartition(_ANSWER)
        if not found:
            return None  # the template changes what is said
        ids = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        first = next((int(token) for token in ids if self.decode([token]).strip()), None)
        return first if first in self._tokenizer.added_tokens_decoder else None

    @property
    def digest(self) -> str:
        """Of all that turns messages into ids."""
        words = f"{tokenizer_fingerprint(self._tokenizer.get_vocab())} {self._template}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with its special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def check(self, fingerprint: str) -> None:
        """Raises ModelMismatch when a server with that fingerprint has another tokenizer."""
        ours = tokenizer_fingerprint(self._tokenizer.get_vocab())
        if fingerprint != ours:
            raise ModelMismatch(f"the servers have tokenizer {fingerprint or '(none)'}; --model has {ours}")

    def check_vision(self, vision: VisionSpec | None) -> None:
        """Read images only if the servers do. Raises ModelMismatch when those make other numbers of tokens of them."""
        if vision is None:
            self._reader = None
        elif self._reader is not None and vision.expansion != self._reader.expansion:
            raise ModelMismatch(
                "the image processors of the servers and of --model make different numbers of tokens of an image"
            )

    def image_column(self, root: Path) -> ImageColumn:
        """Where the images of rows are: in files below `root`, or in the rows; the limits are a dataset's."""
        if self._reader is None:
            return ImageColumn(source=NoImages("the servers, or the model in --model, read text alone"), name=None)
        return image_column(root)

    def prompt(self, asked: Asked) -> tuple[Int32Array, tuple[PlacedImage, ...]]:
        """The chat so far with the beginning of the assistant's turn, and the images in it.

        Raises:
            DataError: the template refuses it, or does not write its images.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                asked.shown,
                tools=[dict(tool) for tool in asked.tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"{asked.origin}: the chat template refuses {json.dumps(asked.shown)[:200]}: {error}"
            ) from None
        if not are_written((*asked.tools, *asked.calls), text):
            raise DataError(f"{asked.origin}: the chat template leaves out its tools, or calls of them")
        # The template writes the special tokens itself.
        ids = np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if self._reader is None:
            return ids, ()
        try:
            expanded_ids, _, placed = expand_images(ids, ids[:0], asked.images, self._reader)
        except InvalidRequest as error:
            raise DataError(f"{asked.origin}: {error}") from None
        return expanded_ids, placed

    def text(self, sample: Sample, stops: Sequence[int]) -> str:
        """What the assistant said, without the stop token, which the template writes."""
        ids = sample.token_ids.tolist()
        text: str = self._tokenizer.decode(
            ids[:-1] if ids[-1] in stops else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
