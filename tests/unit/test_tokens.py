"""The names given to token data tell different data apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.tokens import digest, tokenizer_fingerprint
from kdmesh.types import TokenSequence


def sequence(ids: Sequence[int], positions: Sequence[int]) -> TokenSequence:
    return TokenSequence(token_ids=np.array(ids, np.int32), positions=np.array(positions, np.int32))


@st.composite
def sequences(draw: st.DrawFn) -> TokenSequence:
    ids = draw(st.lists(st.integers(0, 3), min_size=2, max_size=5))
    positions = draw(st.sets(st.integers(0, len(ids) - 2), min_size=1))
    return sequence(ids, sorted(positions))


def content(group: Sequence[TokenSequence]) -> list[tuple[list[int], list[int]]]:
    return [(s.token_ids.tolist(), s.positions.tolist()) for s in group]


groups = st.lists(sequences(), max_size=3)
layers = st.lists(st.integers(1, 3), max_size=3, unique=True).map(sorted)


@given(groups, layers, groups, layers)
def test_digests_are_equal_exactly_when_the_sequences_and_the_layers_are(
    a: list[TokenSequence], of_a: list[int], b: list[TokenSequence], of_b: list[int]
) -> None:
    assert (digest(a, of_a) == digest(b, of_b)) == ((content(a), of_a) == (content(b), of_b))
    assert (digest(a, of_a) == digest(a)) == (not of_a)


def test_digest_is_sixteen_bytes_whose_value_never_changes() -> None:
    words = [1, 0, 3, 0, 7, 8, 9, 2, 0, 0, 1]
    layout = [8, 0, 8, 0, 4, 4, 4, 8, 0, 4, 4]
    by_hand = b"".join(w.to_bytes(n, "little") for w, n in zip(words, layout, strict=True) if n)
    assert digest([sequence([7, 8, 9], [0, 1])]) == hashlib.blake2b(by_hand, digest_size=16).digest()


def test_digest_does_not_depend_on_how_the_array_lies_in_memory() -> None:
    ids = np.arange(20, dtype=np.int32)[::2]
    strided = TokenSequence(token_ids=ids, positions=np.array([3], np.int32))
    assert digest([strided]) == digest([sequence(ids.tolist(), [3])])


def test_boundaries_between_sequences_count() -> None:
    assert digest([sequence([1, 2, 3, 4], [0])]) != digest([sequence([1, 2], [0]), sequence([3, 4], [0])])


def test_fingerprint_ignores_the_order_of_the_vocabulary() -> None:
    assert tokenizer_fingerprint({"a": 0, "b": 1}) == tokenizer_fingerprint({"b": 1, "a": 0})


@pytest.mark.parametrize("other", [{"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 1, "c": 2}, {"a": 0, "B": 1}, {"ab": 0}])
def test_fingerprint_tells_vocabularies_apart(other: dict[str, int]) -> None:
    assert tokenizer_fingerprint({"a": 0, "b": 1}) != tokenizer_fingerprint(other)


def test_fingerprint_takes_any_character() -> None:
    assert len(tokenizer_fingerprint({"\ud800": 0, "é": 1, "": 2})) == 32
