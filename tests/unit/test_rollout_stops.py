"""A stop string is found with the token that completes it, and not before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.sampling.stops import StopStrings, before_stop


def spelt(token_ids: Sequence[int]) -> str:
    """One byte a token, as a byte-level tokenizer of nothing else."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def completed_at(text: str, *stops: str) -> int | None:
    """Number of tokens after which the response is cut."""
    found = StopStrings(stops, spelt)
    ids = text.encode()
    return next((end for end in range(1, len(ids) + 1) if found.is_complete(ids[:end])), None)


@given(text=st.text("abcä€", max_size=60), stop=st.text("abcä€", min_size=1, max_size=5))
def test_it_is_complete_exactly_when_the_text_holds_it(text: str, stop: str) -> None:
    begin = text.find(stop)
    expected = None if begin < 0 else len(text[: begin + len(stop)].encode())
    assert completed_at(text, stop) == expected


@pytest.mark.parametrize(("text", "expected"), [("one END two", 7), ("one two STOP", 12), ("nothing", None)])
def test_the_first_of_several_counts(text: str, expected: int | None) -> None:
    assert completed_at(text, "STOP", "END") == expected


def test_without_a_stop_string_nothing_is_decoded() -> None:
    def forbidden(token_ids: Sequence[int]) -> str:
        raise AssertionError("decoded")

    assert not StopStrings((), forbidden).is_complete([1, 2])


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_left_of_a_text_holds_none_and_begins_it(text: str, stops: list[str]) -> None:
    left = before_stop(text, stops)
    assert text.startswith(left)
    assert not any(stop in left for stop in stops)
    assert left == text or any(text[len(left) :].startswith(stop) for stop in stops)
