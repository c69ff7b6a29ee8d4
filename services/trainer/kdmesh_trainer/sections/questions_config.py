"""What a trainer can be told of questions with known answers, which the student answers by sampling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.rollouts_config import SamplingConfig


class ExactMatch(StrictModel):
    """The response is the answer, but for space around them."""

    name: Literal["exact"] = "exact"

    ignore_case: bool = False
    """Capital and small letters are the same."""


class Contains(StrictModel):
    """The answer stands somewhere in the response."""

    name: Literal["contains"]

    ignore_case: bool = False
    """Capital and small letters are the same."""


class LastNumber(StrictModel):
    """The last number in the response has the value of the last one in the answer: 1,200.0 is 1200."""

    name: Literal["last_number"]


class RegexMatch(StrictModel):
    """What a regular expression finds last in the response is the answer, but for space around them."""

    name: Literal["regex"]

    pattern: str = Field(min_length=1)
    """Of Python's `re`. Its first group is compared, or all that it finds where it has none."""

    ignore_case: bool = False
    """Capital and small letters are the same, for the pattern too."""

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class CustomMatch(StrictModel):
    """A grader of your own: see docs/evaluation.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function, called as function(response, row, **params); returns whether the response is right."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; checked against its signature before anything loads."""


MatchConfig = Annotated[
    ExactMatch | Contains | LastNumber | RegexMatch | CustomMatch,
    Field(discriminator="name"),
]


class AnswerSamplingConfig(SamplingConfig):
    """As SamplingConfig, but the likeliest token unless told otherwise."""

    temperature: float = Field(0.0, ge=0, le=1e6)
    """Divides the logits; 0 takes the likeliest token."""


class QuestionsConfig(StrictModel):
    """Questions with known answers: rollout servers sample the student's answers, which are held against these."""

    path: Path
    """JSONL file with a question in each row. Required."""

    question: str = "question"
    """Column of the text that becomes the user's turn."""

    messages: str | None = None
    """Column of a chat that leads up to the answer, instead of `question`; null: there is none."""

    answer: str | None = "answer"
    """Column of the answer: a text, a number, or a list of them, of which any is right; null: it is the assistant's
    turn that ends `messages`."""

    limit: int | None = Field(None, ge=1)
    """Only this many questions, from the first on; null takes all."""

    samples: int = Field(1, ge=1, le=10_000)
    """Answers to each question."""

    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """For each k the estimated part of the questions of which at least one of k answers is right."""

    sampling: AnswerSamplingConfig = AnswerSamplingConfig()
    """How answers are drawn."""

    match: MatchConfig = ExactMatch()
    """When a response is right."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Of the draws: the same at every evaluation, so that only the weights make a difference."""

    @model_validator(mode="after")
    def _says_where_answers_are(self) -> QuestionsConfig:
        if self.messages is None and self.answer is None:
            raise ValueError("answer is null, which needs `messages`: their last turn is then the answer")
        if self.messages is not None and "question" in self.model_fields_set:
            raise ValueError("there are `question` and `messages`; give one of them")
        return self

    @model_validator(mode="after")
    def _can_be_estimated(self) -> QuestionsConfig:
        if self.pass_at and max(self.pass_at) > self.samples:
            raise ValueError(f"pass_at {max(self.pass_at)} needs as many samples, and samples is {self.samples}")
        if len(set(self.pass_at)) < len(self.pass_at):
            raise ValueError(f"pass_at names a number twice: {list(self.pass_at)}")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples is {self.samples} at sampling.temperature 0, which gives the same answer each time; raise it"
            )
        return self
