"""Encodes chats for a teacher that is told more than the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

import numpy as np

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.images import ImageTokens
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder, read_template, without_answers
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.plain_text import TextEncoder
from kdmesh_trainer.data.encoding.sides import InContext, Prompt
from kdmesh_trainer.data.encoding.templated import teacher_tokenizer
from kdmesh_trainer.data.encoding.turns import Reason, Unusable
from kdmesh_trainer.sections.data_config import (
    DataConfig,
    TeacherContextConfig,
    TeacherMessages,
    TeacherSystemPrompt,
    TeacherTemplate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_encoder(
    tokenizer: PreTrainedTokenizerFast,
    data: DataConfig,
    *,
    takes_chunks: bool = False,
    images: ImageTokens | None = None,
) -> ChatEncoder | ContextEncoder | OtherTokenizerEncoder | TextEncoder:
    """What reads the data as `data` says.

    Args:
        tokenizer: the student's, with the chat template that is trained with.
        takes_chunks: as OtherTokenizerEncoder's.
        images: as ChatEncoder's, for both sides; with another tokenizer there must be none.

    Raises:
        ConfigError: a template is missing, or is not Jinja.
    """
    other = data.teacher_tokenizer
    if other is not None:
        return OtherTokenizerEncoder(
            tokenizer, teacher_tokenizer(other), takes_chunks=takes_chunks, only_last=data.trains_only_last
        )
    if data.has_texts and not data.has_chats:
        return TextEncoder(tokenizer, max_tokens=data.max_tokens, chats=None, images=images)
    student, context = ChatEncoder(tokenizer, images=images, only_last=data.trains_only_last), data.teacher_context
    if data.has_texts:
        return TextEncoder(tokenizer, max_tokens=data.max_tokens, chats=student, images=images)
    match context:
        case None:
            return student
        case TeacherTemplate():
            return ContextEncoder(student, ChatEncoder(tokenizer, read_template(context.path), images=images), context)
        case TeacherMessages() | TeacherSystemPrompt():
            return ContextEncoder(student, student, context)
        case _:
            assert_never(context)


class ContextEncoder:
    """Encodes every chat twice: as the student reads it, and with the same response after the teacher's prompt.

    Only the last assistant turn carries loss: an earlier one would have to be found again in what the teacher is
    told. A chat is taken only if that turn is the same tokens on both sides, and if the template prompts both
    for it in the same words.
    """

    def __init__(self, student: ChatEncoder, teacher: ChatEncoder, context: TeacherContextConfig) -> None:
        """The encoders have one tokenizer; their templates may differ."""
        self._student = student
        self._teacher = teacher
        self._context = context

    def encode(self, chats: Sequence[Chat]) -> list[list[TokenSequence] | Unusable]:
        """For each chat its last turn's sequence, or why there is none."""
        told = [self._told(chat, _leading(chat.messages)) for chat in chats]
        answered = [
            replace(chat, messages=(*leading.messages, *_answer(chat)))
            for chat, leading in zip(chats, told, strict=True)
        ]
        encoded = self._student.encode_last_turns(chats), self._teacher.encode_last_turns(answered)
        return [self._pair(*each) for each in zip(chats, told, *encoded, strict=True)]

    def encode_prompts(self, chats: Sequence[Chat]) -> list[Prompt | Unusable]:
        """For each chat what precedes the turn that comes next, on both sides, or why there is nothing."""
        told = [self._told(chat, without_answers(chat.messages)) for chat in chats]
        encoded = self._student.encode_prompts(chats), self._teacher.encode_prompts(told)
        return [self._prompt(*each) for each in zip(chats, told, *encoded, strict=True)]

    def end_of_turn(self) -> int | None:
        """As ChatEncoder."""
        return self._student.end_of_turn()

    def _told(self, chat: Chat, leading: tuple[Message, ...]) -> Chat:
        """What the teacher is told in place of `leading`."""
        match self._context:
            case TeacherMessages():
                return replace(chat, messages=without_answers(chat.teacher_messages))
            case TeacherSystemPrompt():
                return replace(chat, messages=_with_system(self._context.text, leading))
            case TeacherTemplate():
                return replace(chat, messages=leading)
            case _:
                assert_never(self._context)

    def _pair(
        self, chat: Chat, told: Chat, own: TokenSequence | Unusable, theirs: TokenSequence | Unusable
    ) -> list[TokenSequence] | Unusable:
        if isinstance(own, Unusable):
            return own
        if isinstance(theirs, Unusable):
            return replace(theirs, detail=f"for the teacher: {theirs.detail}")
        refused = _other_answer(chat) or self._other_prompt(_leading(chat.messages), told.messages)
        if refused is not None:
            return refused
        if not np.array_equal(own.labels, theirs.labels):
            detail = f"{own.num_rows} tokens for the student, {theirs.num_rows} for the teacher"
            return Unusable(reason=Reason.OTHER_RESPONSE, detail=detail)
        return [InContext(token_ids=own.token_ids, positions=own.positions, images=own.images, teacher=theirs)]

    def _prompt(self, chat: Chat, told: Chat, own: Prompt | Unusable, theirs: Prompt | Unusable) -> Prompt | Unusable:
        if isinstance(own, Unusable):
            return own
        if isinstance(theirs, Unusable):
            return replace(theirs, detail=f"for the teacher: {theirs.detail}")
        refused = self._other_prompt(without_answers(chat.messages), told.messages)
        return refused or Prompt(
            token_ids=own.token_ids,
            teacher_ids=theirs.token_ids,
            images=own.images,
            teacher_images=theirs.images,
        )

    def _other_prompt(self, leading: Sequence[Message], told: Sequence[Message]) -> Unusable | None:
        """Why the two are not prompted for the same turn, if so."""
        own, theirs = self._student.generation_prompt(leading), self._teacher.generation_prompt(told)
        if own == theirs:
            return None
        return Unusable(reason=Reason.OTHER_PROMPT, detail=f"{own!r} for the student, {theirs!r} for the teacher")


def _leading(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """What comes before the last assistant turn; all where there is none."""
    turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
    return messages[: turns[-1]] if turns else messages


def _answer(chat: Chat) -> tuple[Message, ...]:
    """The last assistant turn, if there is one."""
    turns = [message for message in chat.messages if message.role == "assistant"]
    return tuple(turns[-1:])


def _other_answer(chat: Chat) -> Unusable | None:
    """Why the teacher's messages end in another answer than the chat, if they do."""
    told = chat.teacher_messages
    if not told or told[-1].role != "assistant" or told[-1:] == _answer(chat):
        return None
    return Unusable(reason=Reason.OTHER_RESPONSE, detail=f"the teacher's messages end in {told[-1].content[:40]!r}")


def _with_system(text: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages and messages[0].role == "system":
        first = messages[0]
        parts = (f"{text}\n\n", *first.parts) if first.parts else ()
        return (replace(first, content=f"{text}\n\n{first.content}", parts=parts), *messages[1:])
    return (Message(role="system", content=text), *messages)
