"""Turns chats into token ids with the positions that carry loss."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateSyntaxError
from tokenizers import Encoding, Tokenizer, processors

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.chats.chat_template import TEMPLATE_ERRORS, dated_alike, with_texts
from kdmesh.chats.tool_rows import Tool, are_written, name_of
from kdmesh.errors import ConfigError
from kdmesh.images import ImageTokens
from kdmesh.types import Image, TokenSequence
from kdmesh_trainer.data.encoding.image_tokens import expanded
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.encoding.turns import (
    EncodedText,
    Reason,
    RenderedTurn,
    Unusable,
    Vocabulary,
    common_length,
    find_turn,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


def read_template(path: Path) -> str:
    """The Jinja source in `path`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is not part of any prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from None


class ChatEncoder:
    """Encodes chats under one tokenizer and one chat template.

    Every assistant turn carries loss, but for those of which the row says otherwise, from
    the first token after its prompt to the token that ends the turn, and nothing else does.
    A turn is taken only if a model that is prompted at that place would see exactly the
    tokens before it: the prompt must be a prefix of the rendered chat and end at a token
    boundary, and the turn must read as it did when it was the last one. A chat for which
    that does not hold as a whole (templates that strip the thinking from earlier turns)
    becomes one sequence per assistant turn.

    Nothing is added to what the template renders, so BOS is there once or not at all, as
    in `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str | None = None,
        *,
        images: ImageTokens | None = None,
        only_last: bool = False,
    ) -> None:
        """
        Args:
            template: Jinja source that replaces the tokenizer's own template.
            images: how the model reads them; None where it reads text alone.
            only_last: whether an assistant turn that others follow never carries loss.

        Raises:
            ConfigError: there is no template, or it is not Jinja.
        """
        self._tokenizer = tokenizer
        self._template = with_texts(dated_alike(template_of(tokenizer, template)), tokenizer.apply_chat_template)
        self._backend = _with_whole_offsets(tokenizer)
        self._vocabulary = _vocabulary(tokenizer, self._backend)
        self._images = images
        self._only_last = only_last
        self._has_warned = False
        self._plain_end = functools.cache(self._find_end_of_turn)
        self._check_syntax()

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each chat its sequences, each cut after its last loss token, or why there are none."""
        rendered = [self._render_turns(chat, only_last=self._only_last) for chat in chats]
        usable = [turns for turns in rendered if not isinstance(turns, Unusable)]
        whole = iter(self._sequences([(turns[-1].text, turns) for turns in usable]))
        return [turns if isinstance(turns, Unusable) else self._choose(turns, next(whole)) for turns in rendered]

    def encode_last_turns(self, chats: Sequence[Chat]) -> list[TokenSequence | Unusable]:
        """For each chat the sequence that ends with its last assistant turn, which alone carries loss, or why not."""
        rendered = [self._render_turns(chat, only_last=True) for chat in chats]
        usable = [turns for turns in rendered if not isinstance(turns, Unusable)]
        last = iter(self._sequences([(turn.text, [turn]) for [turn] in usable]))
        return [turns if isinstance(turns, Unusable) else next(last) for turns in rendered]

    def encode_prompts(self, chats: Sequence[Chat]) -> list[Prompt | Unusable]:
        """For each chat what a model is prompted with for the turn that comes next, or why there is nothing.

        An assistant turn at the end is left out: in its place a response will be sampled.
        """
        texts = [self._render_prompt(chat) for chat in chats]
        rendered = [text for text in texts if isinstance(text, str)]
        encodings = iter(self._backend.encode_batch(rendered, add_special_tokens=False))
        return [
            text if isinstance(text, Unusable) else self._prompt(next(encodings), chat)
            for text, chat in zip(texts, chats, strict=True)
        ]

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text by itself; nothing is added to it."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """What a model is prompted with after `messages`. Raises one of TEMPLATE_ERRORS where the template does."""
        return self._render(messages, tools=tools, is_prompt=True)

    def is_special(self, token: int) -> bool:
        """Whether no text but a special token's own stands for it."""
        return token in self._vocabulary.special

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """What the template adds after `messages` to prompt a model; empty where it adds nothing."""
        prompt = self._render(messages, is_prompt=True)
        try:
            return prompt[common_length(prompt, self._render(messages, is_prompt=False)) :]
        except TEMPLATE_ERRORS:
            return ""  # a template that renders whole chats only, and prompts alike

    def end_of_turn(self) -> int | None:
        """The special token that ends an assistant turn; None where the template has none, or cannot be asked."""
        return self._plain_end()

    def _find_end_of_turn(self) -> int | None:
        shortest = (Message(role="user", content="x"), Message(role="assistant", content="y"))
        [encoded] = self.encode([Chat(messages=shortest, origin="the shortest chat")])
        if isinstance(encoded, Unusable):
            return None
        last = int(encoded[-1].labels[-1])
        return last if last in self._vocabulary.special else None

    def _choose(self, turns: list[RenderedTurn], whole: TokenSequence | Unusable) -> list[TokenSequence] | Unusable:
        """The chat as a whole if that is usable, else every turn by itself if all of them are."""
        if isinstance(whole, TokenSequence):
            return [whole]
        if len(turns) == 1:
            return whole
        sequences = []
        for single in self._sequences([(turn.text, [turn]) for turn in turns]):
            if isinstance(single, Unusable):
                return single
            sequences.append(single)
        return sequences

    def _render_turns(self, chat: Chat, *, only_last: bool) -> list[RenderedTurn] | Unusable:
        """Every assistant turn that carries loss as if the chat ended with it. What follows the last trains nothing."""
        turns = [number for number, message in enumerate(chat.messages) if message.role == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(message.role for message in chat.messages))
            found = f"a prompt, and no column {chat.lacks!r}" if chat.lacks else f"roles found: {roles}"
            return Unusable(reason=Reason.NO_ASSISTANT, detail=found)
        if only_last:
            turns = turns[-1:]
        turns = [number for number in turns if chat.messages[number].is_trained]
        if not turns:
            return Unusable(reason=Reason.UNTRAINED, detail="`weight` 0, `train` false, or turns of a prompt")
        if turns[0] == 0:
            return Unusable(reason=Reason.NO_PROMPT, detail="nothing comes before the first one")
        for number in turns:
            if not chat.messages[number].content.strip() and not chat.messages[number].tool_calls:
                return Unusable(reason=Reason.EMPTY, detail=f"message {number}")
        try:
            rendered = [
                RenderedTurn(
                    prompt=self._render(chat.messages[:number], tools=chat.tools, is_prompt=True),
                    text=self._render(chat.messages[: number + 1], tools=chat.tools, is_prompt=False),
                    content=chat.messages[number].content,
                    images=_images_of(chat.messages[:number]),
                    has_calls=bool(chat.messages[number].tool_calls),
                    plain_end=self.end_of_turn() if chat.messages[number].tool_calls else None,
                )
                for number in turns
            ]
        except TEMPLATE_ERRORS as error:
            return Unusable(reason=Reason.TEMPLATE, detail=str(error))
        for number, turn in zip(turns, rendered, strict=True):
            refused = _left_out(chat, number, turn)
            if refused is not None:
                return refused
        return rendered

    def _render_prompt(self, chat: Chat) -> str | Unusable:
        messages = without_answers(chat.messages)
        if not messages:
            return Unusable(reason=Reason.NO_PROMPT, detail="nothing comes before it")
        try:
            text = self._render(messages, tools=chat.tools, is_prompt=True)
        except TEMPLATE_ERRORS as error:
            return Unusable(reason=Reason.TEMPLATE, detail=str(error))
        return _untold(chat, messages, text) or text

    def _prompt(self, encoding: Encoding, chat: Chat) -> Prompt | Unusable:
        if not encoding.ids:
            return Unusable(reason=Reason.NO_PROMPT, detail="the template renders nothing")
        ids = np.array(encoding.ids, np.int32)
        if self._images is None:
            return Prompt(token_ids=ids)
        found = expanded(ids, ids[:0], _images_of(without_answers(chat.messages)), self._images)
        return found if isinstance(found, Unusable) else Prompt(token_ids=found[0], images=found[2])

    def _render(self, messages: Sequence[Message], *, is_prompt: bool, tools: Sequence[Tool] = ()) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [message.for_template() for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=is_prompt,
        )
        return text

    def _check_syntax(self) -> None:
        try:
            self._render([Message(role="user", content="x")], is_prompt=True)
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not Jinja: {error.message}, line {error.lineno}") from None
        except TEMPLATE_ERRORS:
            log.debug("chat template refuses the shortest chat")  # its own rule; every row will tell

    def _sequences(self, texts: Sequence[tuple[str, list[RenderedTurn]]]) -> Iterator[TokenSequence | Unusable]:
        """Each text with loss on its turns, or why not."""
        encodings = self._backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        for (text, turns), encoding in zip(texts, encodings, strict=True):
            yield self._sequence(_encoded(text, encoding), turns)

    def _sequence(self, encoded: EncodedText, turns: list[RenderedTurn]) -> TokenSequence | Unusable:
        labels: list[int] = []
        for turn in turns:
            found = find_turn(encoded, turn, self._vocabulary)
            if isinstance(found, Unusable):
                return found
            if labels and found.tokens.start <= labels[-1]:
                return Unusable(reason=Reason.CHANGED, detail="two turns share tokens")
            if not found.ends_in_special:
                self._warn_of_no_end(turn)
            labels.extend(found.tokens)
        token_ids = np.array(encoded.ids[: labels[-1] + 1], np.int32)
        positions = np.array(labels, np.int32) - 1
        if self._images is None:
            return TokenSequence(token_ids=token_ids, positions=positions)
        found_images = expanded(token_ids, positions, turns[-1].images, self._images)
        if isinstance(found_images, Unusable):
            return found_images
        token_ids, positions, images = found_images
        return TokenSequence(token_ids=token_ids, positions=positions, images=images)

    def _warn_of_no_end(self, turn: RenderedTurn) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "assistant turns do not end in a special token, so the student will not learn to stop",
                extra={"turn_ends_with": turn.text[-20:], "eos_token": self._tokenizer.eos_token},
            )


def _left_out(chat: Chat, number: int, turn: RenderedTurn) -> Unusable | None:
    """What a template that does not know of it leaves out without a word, if it does."""
    message, own = chat.messages[number], turn.text[common_length(turn.text, turn.prompt) :]
    if message.reasoning.strip() not in own:
        return Unusable(reason=Reason.NO_REASONING, detail=f"message {number}")
    if not all(name_of(call) in own for call in message.tool_calls):
        return Unusable(reason=Reason.NO_CALLS, detail=f"message {number}")
    return _untold(chat, chat.messages[:number], turn.prompt)


def _untold(chat: Chat, leading: Sequence[Message], prompt: str) -> Unusable | None:
    """Why a model that is prompted so does not see the chat's tools, or what `leading` calls, if it does not."""
    if not are_written(chat.tools, prompt):
        return Unusable(reason=Reason.NO_TOOLS, detail=f"{len(chat.tools)} tools")
    calls = [call for message in leading for call in message.tool_calls]
    if not are_written((*chat.tools, *calls), prompt):
        return Unusable(reason=Reason.NO_CALLS, detail=f"{len(calls)} calls before it")
    return None


def _images_of(messages: Sequence[Message]) -> tuple[Image, ...]:
    return tuple(image for message in messages for image in message.images)


def without_answers(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages without the assistant's turns at their end, in whose place a response comes."""
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return messages


def template_of(tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> str:
    """The Jinja source of chats: `template`, or the tokenizer's. Raises ConfigError when there is none."""
    try:
        found: str = tokenizer.get_chat_template(template)
    except ValueError:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template, and a base model need not have one: "
            "set data.chat_template to a Jinja file, best that of the teacher"
        ) from None
    return found


def _with_whole_offsets(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy whose offsets include the space that belongs to a token.

    Byte-level tokenizers may trim it from the offsets; then a token that spans the end of
    a prompt "...: " would seem to begin after it.
    """
    backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _vocabulary(tokenizer: PreTrainedTokenizerFast, backend: Tokenizer) -> Vocabulary:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}

    @functools.lru_cache(maxsize=1024)  # prompts mostly end alike
    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return Vocabulary(
        special=frozenset(special.union(tokenizer.all_special_ids)), added=frozenset(added), encode=encode
    )


def _encoded(text: str, encoding: Encoding) -> EncodedText:
    offsets = encoding.offsets
    return EncodedText(text=text, ids=encoding.ids, begins=[b for b, _ in offsets], ends=[e for _, e in offsets])
