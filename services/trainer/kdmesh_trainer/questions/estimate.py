"""Estimates from how many of each question's samples were right, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions."""

    mean: float  # 0 to 1
    standard_error: float | None  # of the mean; None: a single question says nothing of it


def mean_over_questions(values: Sequence[float]) -> Estimate:
    """The mean of one value for each question, at least one.

    Questions count as independent draws, samples of one question do not: so the error is that of the questions'
    means, sqrt(sum (v - mean)^2 / (N (N - 1))), and is 0 where all questions have the same value.

    Source: Miller 2024, arXiv:2411.00640, the standard error of clusters, each of them a question.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, standard_error=None)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean=mean, standard_error=math.sqrt(squares / (count * (count - 1))))


def pass_at(k: int, *, num_samples: int, num_right: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from `num_samples` >= k of them.

    1 - C(n - c, k) / C(n, k): the part of all choices of k samples that hold a right one.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    assert 1 <= k <= num_samples and 0 <= num_right <= num_samples
    choices = math.comb(num_samples, k)
    return (choices - math.comb(num_samples - num_right, k)) / choices
