"""What became of the answers to questions, each and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdmesh_trainer.questions.estimate import Estimate, mean_over_questions, pass_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled answer."""

    text: str  # without the token that ends it
    is_right: bool
    is_cut_off: bool  # ended at a limit of length
    num_tokens: int
    error: str = ""  # of the grader, which then counts it as wrong; empty: it had none


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question's samples, in the order of their seeds."""

    number: int  # of the question, from 0
    responses: tuple[Response, ...]  # at least one

    @property
    def num_right(self) -> int:
        """How many of them are."""
        return sum(response.is_right for response in self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScores:
    """How the student answers; equal on every rank."""

    accuracy: Estimate  # the part of a question's samples that is right
    pass_at: Mapping[int, Estimate]  # by k
    cut_off_fraction: float  # of samples that ended at a limit of length
    response_tokens_mean: float
    num_questions: int
    num_samples: int  # of all questions together
    grader_errors: int  # samples on which the grader failed; they count as wrong

    def figures(self) -> dict[str, float | None]:
        """Every figure by its name, in one level; pass_at_4 is that for k = 4."""
        estimates = {"accuracy": self.accuracy, **{f"pass_at_{k}": each for k, each in self.pass_at.items()}}
        figures: dict[str, float | None] = {}
        for name, each in estimates.items():
            figures |= {name: each.mean, f"{name}_standard_error": each.standard_error}
        return figures | {
            "cut_off_fraction": self.cut_off_fraction,
            "response_tokens_mean": self.response_tokens_mean,
            "num_questions": self.num_questions,
            "num_samples": self.num_samples,
            "grader_errors": self.grader_errors,
        }

    def sentence(self) -> str:
        """For a person."""
        estimates = [("right", self.accuracy), *((f"pass@{k}", each) for k, each in self.pass_at.items())]
        shown = ", ".join(f"{name} {_percent(each)}" for name, each in estimates)
        return f"{self.num_samples} answers to {self.num_questions} questions: {shown}"


def scores_of(answered: Sequence[Answered], *, ks: Sequence[int]) -> AnswerScores:
    """The figures of at least one question, each with as many samples.

    Args:
        ks: of pass@k, none above the number of samples.
    """
    samples = len(answered[0].responses)
    responses = [response for each in answered for response in each.responses]
    return AnswerScores(
        accuracy=mean_over_questions([each.num_right / samples for each in answered]),
        pass_at={
            k: mean_over_questions([pass_at(k, num_samples=samples, num_right=each.num_right) for each in answered])
            for k in ks
        },
        cut_off_fraction=sum(response.is_cut_off for response in responses) / len(responses),
        response_tokens_mean=sum(response.num_tokens for response in responses) / len(responses),
        num_questions=len(answered),
        num_samples=len(responses),
        grader_errors=sum(bool(response.error) for response in responses),
    )


def _percent(estimate: Estimate) -> str:
    error = "" if estimate.standard_error is None else f" (standard error {estimate.standard_error:.1%})"
    return f"{estimate.mean:.1%}{error}"
