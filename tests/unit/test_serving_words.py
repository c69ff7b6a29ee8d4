"""Numbers are written as people read them."""

from __future__ import annotations

import pytest

from kdmesh.serving.words import count


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (1e-6, "0"), (0.033, "0.033"), (950, "950"), (999.7, "1 k"), (1_254, "1.25 k"), (32_100_000, "32.1 M")],
)
def test_a_count_has_three_digits_and_what_is_left_of_a_rate_is_none(number: float, words: str) -> None:
    assert count(number) == words
