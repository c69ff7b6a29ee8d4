"""What is estimated of a model's answers, against all ways to choose samples and against numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh_trainer.questions.estimate import mean_over_questions, pass_at
from kdmesh_trainer.questions.scores import Answered, Response, scores_of


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_pass_at_k_is_the_part_of_all_choices_of_k_samples_that_hold_a_right_one(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        is_right = [number < num_right for number in range(num_samples)]
        for k in range(1, num_samples + 1):
            choices = [any(choice) for choice in combinations(is_right, k)]
            estimate = pass_at(k, num_samples=num_samples, num_right=num_right)
            assert estimate == pytest.approx(sum(choices) / len(choices), abs=1e-15)


def test_pass_at_k_has_no_bias() -> None:
    """Over all outcomes of n samples that are right with chance p, its mean is that of k samples: 1 - (1 - p)^k."""
    num_samples, k, p = 6, 3, 0.3
    mean = 0.0
    for outcome in range(2**num_samples):
        num_right = outcome.bit_count()
        chance = p**num_right * (1 - p) ** (num_samples - num_right)
        mean += chance * pass_at(k, num_samples=num_samples, num_right=num_right)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_k_is_exact_where_factorials_are_beyond_floats() -> None:
    assert pass_at(1, num_samples=10_000, num_right=2500) == 0.25
    assert pass_at(9_000, num_samples=10_000, num_right=1) == 0.9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_standard_error_is_that_of_the_mean_of_questions(values: list[float]) -> None:
    estimate = mean_over_questions(values)
    assert estimate.mean == pytest.approx(np.mean(values), abs=1e-12)
    expected = np.std(values, ddof=1) / np.sqrt(len(values))
    assert estimate.standard_error == pytest.approx(expected, abs=1e-12)


def test_one_question_has_no_standard_error() -> None:
    assert mean_over_questions([0.5]).standard_error is None


def response(*, is_right: bool, is_cut_off: bool = False, num_tokens: int = 4, error: str = "") -> Response:
    return Response(text="x", is_right=is_right, is_cut_off=is_cut_off, num_tokens=num_tokens, error=error)


def test_samples_of_one_question_do_not_count_as_several_questions() -> None:
    """Two questions of which one is always right: the error is that of two draws, however many samples there are."""
    for samples in (1, 4):
        answered = [
            Answered(number=number, responses=tuple(response(is_right=number == 0) for _ in range(samples)))
            for number in range(2)
        ]
        scores = scores_of(answered, ks=(1,))
        assert (scores.accuracy.mean, scores.accuracy.standard_error) == (0.5, 0.5)
        assert scores.pass_at[1] == scores.accuracy


def test_figures_have_one_level_and_every_k_its_name() -> None:
    wrong = response(is_right=False, is_cut_off=True, num_tokens=8, error="ValueError: no")
    right = response(is_right=True)
    answered = [Answered(number=0, responses=(right, wrong)), Answered(number=1, responses=(wrong, wrong))]
    scores = scores_of(answered, ks=(1, 2))
    assert scores.figures() == {
        "accuracy": 0.25,
        "accuracy_standard_error": 0.25,
        "pass_at_1": 0.25,
        "pass_at_1_standard_error": 0.25,
        "pass_at_2": 0.5,
        "pass_at_2_standard_error": 0.5,
        "cut_off_fraction": 0.75,
        "response_tokens_mean": 7.0,
        "num_questions": 2,
        "num_samples": 4,
        "grader_errors": 3,
    }
    assert scores.sentence() == (
        "4 answers to 2 questions: right 25.0% (standard error 25.0%), pass@1 25.0% (standard error 25.0%), "
        "pass@2 50.0% (standard error 50.0%)"
    )
