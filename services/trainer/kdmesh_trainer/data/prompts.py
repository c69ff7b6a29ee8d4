"""Reads a dataset into the prompts that responses are sampled for, under the policies of the configuration."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol, TypeAlias

from kdmesh.chats.chat_rows import Chat
from kdmesh.errors import DataError
from kdmesh.tokens import DIGEST_BYTES
from kdmesh_trainer.data.encoding.sides import Prompt, Question
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.data.files.readers import Reader, groups_of
from kdmesh_trainer.data.reading_progress import reading_told

log = logging.getLogger(__name__)

# What responses to the prompt of a chat are judged by. Raises DataError when the chat does not say it.
QuestionOf: TypeAlias = Callable[[Chat], Question]

# Stands where the next prompt's length would: no length is this.
_TEACHERS = (2**64 - 1).to_bytes(8, "little")
_IMAGE = (2**64 - 3).to_bytes(8, "little")
_NAMES = (2**64 - 2).to_bytes(8, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPolicy:
    """What becomes of rows that cannot be used as they are."""

    max_tokens: int  # of a prompt: the rest of a sequence is its response's
    too_long: Literal["drop", "fail"]
    unusable: Literal["drop", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of a dataset."""

    rows: int
    prompts: int
    dropped_too_long: int
    unusable: dict[str, int]  # rows left out, by reason
    tokens: int

    def plus(self, other: PromptReport) -> PromptReport:
        """That of both."""
        return PromptReport(
            rows=self.rows + other.rows,
            prompts=self.prompts + other.prompts,
            dropped_too_long=self.dropped_too_long + other.dropped_too_long,
            unusable=dict(Counter(self.unusable) + Counter(other.unusable)),
            tokens=self.tokens + other.tokens,
        )

    def tell(self, name: str, **facts: object) -> None:
        """Log it as that of dataset `name`. Raises DataError when there is no prompt."""
        log.info("prompts read", extra={"dataset": name, **asdict(self), **facts})
        if not self.prompts:
            too_long = "too long for source.sampling.max_new_tokens to be within data.max_tokens too"
            counts = {**self.unusable, too_long: self.dropped_too_long}
            losses = ", ".join(f"{count} x {reason}" for reason, count in counts.items() if count)
            raise DataError(f"dataset {name}: none of {self.rows} rows gives a prompt: {losses}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a dataset, in its order."""

    prompts: list[Prompt]
    report: PromptReport


class PromptEncoder(Protocol):
    """Turns chats into prompts."""

    def encode_prompts(self, chats: Sequence[Chat]) -> list[Prompt | Unusable]:
        """For each chat what precedes the turn that comes next, or why there is nothing."""
        ...


def load_prompts(
    name: str, reader: Reader, encoder: PromptEncoder, policy: PromptPolicy, question_of: QuestionOf | None = None
) -> PromptSet:
    """Read and encode the prompts of a dataset; what was left out is counted and logged.

    Args:
        name: for logs and errors.
        question_of: None: nobody judges responses by their row.

    Raises:
        DataError: a row is refused, or one is too long or unusable and the policy says fail,
            or nothing is left.
    """
    found = encode_prompts(reading_told(name, reader()), encoder, policy, question_of)
    found.report.tell(name)
    return found


def encode_prompts(
    chats: Iterable[Chat], encoder: PromptEncoder, policy: PromptPolicy, question_of: QuestionOf | None = None
) -> PromptSet:
    """The prompts of some chats, of which there may be none; errors are those of load_prompts."""
    intake = _Intake(policy, question_of)
    for group in groups_of(chats):
        for chat, encoded in zip(group, encoder.encode_prompts(group), strict=True):
            intake.add(chat, encoded)
    return intake.prompt_set()


def digest_prompts(prompts: Sequence[Prompt]) -> bytes:
    """16-byte BLAKE2b over the ids; each prompt, and then the teacher's where that differs, after its length.

    The name of a prompt's teacher follows, where there are several.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for prompt in prompts:
        state.update(len(prompt.token_ids).to_bytes(8, "little"))
        state.update(prompt.token_ids.astype("<i4").tobytes())
        if prompt.teacher_ids is not None:
            state.update(_TEACHERS + len(prompt.teacher_ids).to_bytes(8, "little"))
            state.update(prompt.teacher_ids.astype("<i4").tobytes())
        for placed in (*prompt.images, *prompt.teacher_images):
            state.update(_IMAGE + placed.digest + placed.first_token.to_bytes(8, "little"))
        if prompt.teacher_name:
            state.update(_NAMES + len(prompt.teacher_name).to_bytes(8, "little") + prompt.teacher_name.encode())
    return state.digest()


class _Intake:
    """Applies the policy to one row after the other."""

    def __init__(self, policy: PromptPolicy, question_of: QuestionOf | None) -> None:
        self._policy = policy
        self._question_of = question_of
        self._rows = 0
        self._prompts: list[Prompt] = []
        self._dropped_too_long = 0
        self._unusable: Counter[str] = Counter()

    def add(self, chat: Chat, encoded: Prompt | Unusable) -> None:
        """Take the row's prompt if it can be taken."""
        self._rows += 1
        if isinstance(encoded, Unusable):
            if self._policy.unusable == "fail":
                raise DataError(
                    f"{chat.origin}: {encoded.reason} ({encoded.detail}); `data.unusable: drop` leaves such rows out"
                )
            self._unusable[encoded.reason.value] += 1
        elif len(encoded.token_ids) <= self._policy.max_tokens:
            question = None if self._question_of is None else self._question_of(chat)
            self._prompts.append(replace(encoded, teacher_name=chat.teacher_name, question=question))
        elif self._policy.too_long == "fail":
            raise DataError(
                f"{chat.origin}: a prompt of {len(encoded.token_ids)} tokens, and {self._policy.max_tokens} leave room "
                "for source.sampling.max_new_tokens within data.max_tokens; `source.too_long: drop` leaves such rows "
                "out"
            )
        else:
            self._dropped_too_long += 1

    def prompt_set(self) -> PromptSet:
        """What was taken."""
        report = PromptReport(
            rows=self._rows,
            prompts=len(self._prompts),
            dropped_too_long=self._dropped_too_long,
            unusable=dict(self._unusable),
            tokens=sum(len(prompt.token_ids) for prompt in self._prompts),
        )
        return PromptSet(prompts=self._prompts, report=report)
