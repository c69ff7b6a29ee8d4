"""A group of sequences becomes requests within the limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.errors import InvalidRequest
from kdmesh.rpc.teachers.splitting import split
from tests.support.teacher_requests import sequence
from tests.unit.test_rpc_codec import MODEL

LIMITED = replace(MODEL, max_sequence_tokens=20, max_request_tokens=30, max_request_rows=25)


@given(st.lists(st.tuples(st.integers(2, 20), st.integers(1, 5)), min_size=1, max_size=30))
def test_parts_keep_order_and_limits_and_are_as_full_as_the_order_allows(shapes: list[tuple[int, int]]) -> None:
    sequences = [sequence(tokens, every=every) for tokens, every in shapes]
    parts = split(sequences, LIMITED)
    assert [s for part in parts for s in part] == sequences
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        tokens, rows = sum(s.num_tokens for s in part), sum(s.num_rows for s in part)
        assert part
        assert tokens <= 30
        assert rows <= 25
        if following is not None:
            assert tokens + following[0].num_tokens > 30 or rows + following[0].num_rows > 25


@pytest.mark.parametrize(
    ("lengths", "limits", "sentence"),
    [
        ([], {}, "no sequence"),
        ([5, 21], {}, "sequence 1 has 21 tokens; the teacher takes at most 20"),
        ([20], {"max_request_tokens": 10}, "sequence 0 has 20 tokens; the teacher takes at most 10"),
        ([20], {"max_request_rows": 5}, "sequence 0 asks for 19 rows; one slot of the teacher holds 5"),
    ],
)
def test_what_can_never_fit_is_refused(lengths: list[int], limits: dict[str, int], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        split([sequence(length) for length in lengths], replace(LIMITED, **limits))
