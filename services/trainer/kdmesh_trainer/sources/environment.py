"""Has code of the user's own answer the student's turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kdmesh.chats.chat_rows import Message, chat_from_messages
from kdmesh.errors import ConfigError, DataError, EnvironmentFailed
from kdmesh.extension import resolve
from kdmesh.types import FinishReason, Int32Array, Sample
from kdmesh_trainer.data.encoding.continuation import Continuation, Conversation
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.sections.environment_config import EnvironmentConfig
from kdmesh_trainer.sources.rollouts import EpisodeEnd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Respond = Callable[[list[dict[str, object]], dict[str, object]], Any]
"""(the messages so far, of which the last is the student's turn, the row) -> the next messages, or None at the end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """An episode after one more turn of the student."""

    messages: tuple[Message, ...]  # the last is that turn
    end: EpisodeEnd | None  # None: the student goes on
    conversation: Conversation  # which it goes on; where it does not, as it was
    token_ids: Int32Array  # [M] from behind the turn to the next one; where it does not go on, M = 0


class Environment:
    """Answers turns. It keeps nothing of an episode, so that one may be drawn again; for any thread.

    Attributes:
        target: the user's function, module:function.
    """

    def __init__(self, cfg: EnvironmentConfig, respond: Respond, continuation: Continuation) -> None:
        self.target = cfg.respond
        self._max_turns = cfg.max_turns
        self._respond = respond
        self._continuation = continuation

    def begin(self, question: Question) -> Conversation:
        """What the student is asked. Raises EnvironmentFailed when its template refuses it."""
        try:
            return self._continuation.begin(question.chat)
        except DataError as error:
            raise EnvironmentFailed(f"{question.chat.origin}: {error}") from None

    def answer(
        self, question: Question, conversation: Conversation, sample: Sample, *, turns: int, ends: Collection[int]
    ) -> Answered:
        """What becomes of an episode with this turn.

        Args:
            turns: that the student has had, this one included.
            ends: tokens that end a turn.

        Raises:
            EnvironmentFailed: the function raised or returned anything but messages, or the template does not write
                them; with the row and the function.
        """
        turn = self._continuation.drawn(sample.token_ids, ends)
        ended = Answered(
            messages=(*conversation.messages, turn.message),
            end=EpisodeEnd.LENGTH,
            conversation=conversation,
            token_ids=np.empty(0, np.int32),
        )
        if sample.finish_reason is FinishReason.LENGTH:
            return ended
        where = f"{question.chat.origin}: source.environment {self.target}, turn {turns}"
        replies = self._replies(ended.messages, question.row, where)
        if replies is None:
            return replace(ended, end=EpisodeEnd.ENVIRONMENT)
        if turns == self._max_turns:
            return replace(ended, end=EpisodeEnd.TURNS)
        try:
            found = self._continuation.go_on(conversation, turn, replies)
        except DataError as error:
            raise EnvironmentFailed(f"{where}: {error}") from None
        if found is None:
            return replace(ended, end=EpisodeEnd.TEMPLATE)
        return replace(ended, end=None, conversation=found[0], token_ids=found[1])

    def _replies(self, messages: tuple[Message, ...], row: Mapping[str, Any], where: str) -> tuple[Message, ...] | None:
        try:
            # A copy of all of it: what a function changes would be there when an episode is drawn again.
            answer = self._respond([message.for_template() for message in messages], copy.deepcopy(dict(row)))
        except BaseException as failure:  # of a thread that ends by itself: sys.exit() is no more than a failure
            raise EnvironmentFailed(f"{where}: {type(failure).__name__}: {failure}") from failure
        if answer is None:
            return None
        if not isinstance(answer, list | tuple) or not answer:
            raise EnvironmentFailed(
                f"{where} returned {answer!r:.100}; it must be a list of at least one message, or None at the end"
            )
        try:
            replies = chat_from_messages(answer, origin=where).messages
        except DataError as error:
            raise EnvironmentFailed(str(error)) from None
        if any(reply.role == "assistant" for reply in replies):
            raise EnvironmentFailed(f"{where} returned a turn of the assistant, which is the student's alone")
        return replies


def resolve_environment(cfg: EnvironmentConfig, tokenizer: PreTrainedTokenizerFast) -> Environment:
    """The environment that `cfg` names.

    Args:
        tokenizer: the student's, with the chat template that is trained with.

    Raises:
        ConfigError: the function cannot be found or called, or the template does not go with several turns.
    """
    try:
        respond = resolve(cfg.respond, cfg.params, num_arguments=2)
    except ConfigError as error:
        raise ConfigError(f"source.environment: {error}") from None
    return Environment(cfg, respond, Continuation(tokenizer, keeps_drawn=cfg.history == "drawn"))
