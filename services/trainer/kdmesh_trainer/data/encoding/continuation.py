"""What a chat template writes between a turn that was drawn and the one that comes next."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.chats.chat_template import TEMPLATE_ERRORS
from kdmesh.chats.tool_rows import Tool
from kdmesh.errors import ConfigError, DataError
from kdmesh.types import Int32Array
from kdmesh_trainer.data.encoding.chat import ChatEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PLACEHOLDER = "a-turn-that-was-drawn-5f1c0d9e7a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat that may go on."""

    messages: tuple[Message, ...]  # at least one
    tools: tuple[Tool, ...]
    text: str  # what the template wrote of them when it last prompted for a turn


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTurn:
    """The text of a turn as it was drawn, special tokens included."""

    content: str  # without the token that ended it
    end: str  # that token's text; empty: something else ended the turn

    @property
    def message(self) -> Message:
        """As the template takes it."""
        return Message(role="assistant", content=self.content)


class Continuation:
    """Continues chats by what a template writes, token by token behind what was drawn.

    Drawn ids are never encoded again: only the text that the template writes behind a turn is, which begins with the
    token that ends the turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, keeps_drawn: bool) -> None:
        """
        Args:
            tokenizer: with the chat template that is trained with.
            keeps_drawn: whether chats go on from what was drawn, also where the template would write that otherwise.

        Raises:
            ConfigError: there is no template, or it never writes an earlier turn as it was drawn, and that is wanted.
        """
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._keeps_drawn = keeps_drawn
        self._refuse_rewriting()

    def begin(self, chat: Chat) -> Conversation:
        """The chat, to whose end a turn is drawn. Raises DataError when the template refuses it."""
        return Conversation(messages=chat.messages, tools=chat.tools, text=self._prompt_text(chat.messages, chat.tools))

    def drawn(self, token_ids: Int32Array, ends: Collection[int]) -> DrawnTurn:
        """A turn's text; the last of its ids may be one that ends turns."""
        ids = token_ids.tolist()
        length = len(ids) - (ids[-1] in ends)
        return DrawnTurn(content=self._text(ids[:length]), end=self._text(ids[length:]))

    def go_on(
        self, conversation: Conversation, turn: DrawnTurn, replies: Sequence[Message]
    ) -> tuple[Conversation, Int32Array] | None:
        """The conversation with a turn and the replies to it, and the ids [M] from behind the turn to the next one.

        Returns:
            None: the template would write what came before otherwise than it was drawn.

        Raises:
            DataError: the template refuses the messages, or does not write them.
        """
        written = replace(turn, content=_PLACEHOLDER) if self._keeps_drawn else turn
        text = self._prompt_text((*conversation.messages, written.message, *replies), conversation.tools)
        follows = _behind_placeholder(text) if self._keeps_drawn else _behind(text, conversation.text, turn)
        if follows is None:
            return None
        _check_are_written(replies, follows)
        ids = np.array(self._ids(follows, turn), np.int32)
        messages = (*conversation.messages, turn.message, *replies)
        return replace(conversation, messages=messages, text=text), ids

    def _ids(self, follows: str, turn: DrawnTurn) -> list[int]:
        """Of what follows a turn, without what ends it if it has ended: no two tokens end it."""
        ids = self._encoder.encode_text(follows)
        if not turn.end:
            return ids
        # Where it ended by another token than the template writes there, its own stands for that one.
        is_ended_again = follows.startswith(turn.end) or self._encoder.end_of_turn() is not None
        if is_ended_again and ids and self._encoder.is_special(ids[0]):
            return ids[1:]
        return self._encoder.encode_text(follows.removeprefix(turn.end))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _prompt_text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        try:
            return self._encoder.prompt_text(messages, tools)
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"the chat template refuses messages of {roles}: {error}") from None

    def _refuse_rewriting(self) -> None:
        asked = Chat(messages=(Message(role="user", content="x"),), origin="the shortest chat")
        end = self._encoder.end_of_turn()
        turn = DrawnTurn(content="y", end="" if end is None else self._text([end]))
        try:
            found = self.go_on(self.begin(asked), turn, [Message(role="user", content="z")])
        except DataError:
            return  # the template's own rule for so short a chat; rows will tell
        if found is None:
            raise ConfigError(
                "source.environment.history is templated, and the chat template writes a turn of the assistant "
                "otherwise once another message follows it: no episode could have two turns. `history: drawn` goes on "
                "from what was drawn; or give a data.chat_template that keeps earlier turns as they were"
            )


def _behind(text: str, before: str, turn: DrawnTurn) -> str | None:
    """What follows a turn's content, which follows `before` as it was drawn, but for space around it.

    A template may trim that, or write some of its own; then what was drawn stands.
    """
    if not text.startswith(before):
        return None
    rest, content = text[len(before) :], turn.content
    words = content.strip()
    written = rest.lstrip() if words else rest
    if not written.startswith(words):
        return None
    follows = written[len(words) :].removeprefix(content[len(content.rstrip()) :])
    return follows if follows.startswith(turn.end) else None


def _behind_placeholder(text: str) -> str:
    _, found, follows = text.partition(_PLACEHOLDER)
    if not found:
        raise DataError("the chat template does not write the assistant's turns")
    return follows


def _check_are_written(replies: Sequence[Message], follows: str) -> None:
    for reply in replies:
        content = reply.content.strip()
        as_json = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        if not any(form in follows for form in (content, *as_json)):
            raise DataError(f"the chat template leaves out a message of role {reply.role!r}")
