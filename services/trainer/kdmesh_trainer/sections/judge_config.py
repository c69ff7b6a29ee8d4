"""What a trainer can be told of how much each of the student's own samples counts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.questions_config import MatchConfig

SampleWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FinishedJudge(StrictModel):
    """Samples that have ended weigh 1, and others less."""

    name: Literal["finished"]

    cut: SampleWeight = 0.0
    """Weight of samples that were cut at max_new_tokens; 0 leaves them out."""


class MatchJudge(StrictModel):
    """Samples weigh by whether they are right, as the answers to evaluation.questions are."""

    name: Literal["match"]

    match: MatchConfig
    """When a response is right. Required."""

    answer: str | None = None
    """Column of the answer: a text, a number, or a list of them, of which any is right; null: it is the assistant's
    turn that ends the chat."""

    right: SampleWeight = 1.0
    """Weight of samples that are right."""

    wrong: SampleWeight = 0.0
    """Weight of all others; 0 leaves them out."""

    cut: SampleWeight | None = None
    """Weight of samples that were cut at max_new_tokens, right or wrong; null: as of any other."""

    @model_validator(mode="after")
    def _trains_on_some(self) -> MatchJudge:
        if self.right == self.wrong == 0:
            raise ValueError("right and wrong are both 0, so that nothing would be trained on; raise one")
        return self


class CustomJudge(StrictModel):
    """A judge of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function, called as function(response, row, is_cut_off, **params), with source.environment as
    function(response, row, is_cut_off, messages, **params); returns the sample's weight."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; checked against its signature before anything loads."""

    def num_arguments(self, *, of_episodes: bool) -> int:
        """That are given by their place."""
        return 4 if of_episodes else 3


JudgeConfig = Annotated[FinishedJudge | MatchJudge | CustomJudge, Field(discriminator="name")]
