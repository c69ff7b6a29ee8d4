"""Tokens of two tokenizers are matched by the bytes that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdmesh.alignment.boundaries import boundary_bytes, boundary_tokens
from kdmesh.alignment.chunks import Alignment, align
from kdmesh.alignment.spans import Spans, spans_of_ids, spans_of_text
from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.alignment.vocabularies import shared_tokens
from kdmesh.errors import ConfigError
from tests.support.trained_tokenizers import KINDS, TEXTS, tokenizer


def spans(kind: str, text: str) -> Spans:
    return spans_of_text(tokenizer(kind), text, token_bytes(tokenizer(kind)))


def aligned(student: str, teacher: str, text: str, teacher_text: str | None = None) -> Alignment:
    theirs = text if teacher_text is None else teacher_text
    return align(spans(student, text), text.encode(), spans(teacher, theirs), theirs.encode(), most_tokens=16)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_of_a_texts_tokens_rise_to_its_length(kind: str) -> None:
    for text in TEXTS:
        found = spans(kind, text)
        assert len(found.ends) == len(found.token_ids)
        assert (np.diff(found.ends) >= 0).all()
        # What the last tokens leave out are spaces.
        assert text.encode()[found.ends[-1] :].strip() == b""


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_small"])
def test_tokens_of_a_byte_level_vocabulary_are_the_text(kind: str) -> None:
    table = token_bytes(tokenizer(kind))
    for text in TEXTS:
        by_text = spans(kind, text)
        by_ids, joined = spans_of_ids(by_text.token_ids, table)
        assert joined == text.encode()
        assert np.array_equal(by_ids.ends, by_text.ends)


def test_tokens_of_a_sentence_piece_vocabulary_are_the_text_after_a_space() -> None:
    table = token_bytes(tokenizer("sentence_piece_bytes"))
    for text in TEXTS:
        _, joined = spans_of_ids(spans("sentence_piece_bytes", text).token_ids, table)
        assert joined.lstrip(b" ") == text.encode().lstrip(b" ")


def test_special_tokens_and_ids_beyond_the_vocabulary_stand_for_nothing() -> None:
    made = tokenizer("byte_level")
    table = token_bytes(made)
    end = made.convert_tokens_to_ids("<|end|>")
    word = made("student", add_special_tokens=False)["input_ids"]
    found, text = spans_of_ids(np.array([end, *word, end, 10**6], dtype=np.int32), table)
    assert text == b"student"
    assert found.ends.tolist() == [0, *found.ends[1:-2].tolist(), 7, 7]


def test_ids_that_no_token_has_stand_for_nothing() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={**{c: n for n, c in enumerate(alphabet)}, "he": 300}, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert len(table) == 301
    assert table[300] == b"he"
    assert table[256:300] == [None] * 44


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_at_least_95_percent_of_the_bytes_of_any_pair_are_aligned(student: str, teacher: str) -> None:
    found = [aligned(student, teacher, text) for text in TEXTS]
    assert sum(each.aligned_bytes for each in found) >= 0.95 * sum(len(text.encode()) for text in TEXTS)
    if student == teacher:
        assert all(each.is_single.all() for each in found if student.startswith("byte_level"))


@given(
    text=st.text(max_size=60),
    student=st.sampled_from(KINDS),
    teacher=st.sampled_from(KINDS),
)
def test_chunks_stand_for_the_same_bytes_and_cannot_be_split(text: str, student: str, teacher: str) -> None:
    mine, theirs = spans(student, text), spans(teacher, text)
    found = align(mine, text.encode(), theirs, text.encode(), most_tokens=10**6)

    def begins(of: Spans, token: int) -> int:
        return int(of.ends[token - 1]) if token else 0

    for s0, s1, t0, t1 in zip(
        found.student_begins, found.student_ends, found.teacher_begins, found.teacher_ends, strict=True
    ):
        assert begins(mine, s0) == begins(theirs, t0)
        assert mine.ends[s1 - 1] == theirs.ends[t1 - 1]
        inner = set(mine.ends[s0 : s1 - 1].tolist()) & set(theirs.ends[t0 : t1 - 1].tolist())
        assert not inner - {begins(mine, s0), int(mine.ends[s1 - 1])}
    for begun, ended in ((found.student_begins, found.student_ends), (found.teacher_begins, found.teacher_ends)):
        assert (begun < ended).all()
        assert (ended[:-1] <= begun[1:]).all()


def test_it_goes_on_after_what_differs() -> None:
    text = "A sentence that both have. Only here: alpha. Another sentence that both of them have."
    changed = text.replace("Only here: alpha.", "Something else entirely!")
    found = aligned("byte_level", "sentence_piece_bytes", text, changed)
    # All but what differs, and a token on either side of it.
    assert found.aligned_bytes > len(text) - len("Only here: alpha.") - 12
    ends = spans("byte_level", text).ends
    assert ends[found.student_ends[-1] - 1] == len(text)


@given(
    front=st.text("ab", max_size=6),
    differing=st.tuples(st.text("ab", max_size=12), st.text("ab", max_size=12)),
    back=st.text("ab", max_size=12),
    lengths=st.tuples(*[st.lists(st.integers(0, 3), max_size=20)] * 2),
    most_tokens=st.integers(1, 3),
)
def test_chunks_of_texts_that_differ_are_the_same_bytes_and_no_token_is_in_two(
    front: str, differing: tuple[str, str], back: str, lengths: tuple[list[int], list[int]], most_tokens: int
) -> None:
    texts = [(front + middle + back).encode() for middle in differing]
    mine, theirs = (cut(text, sizes) for text, sizes in zip(texts, lengths, strict=True))
    found = align(spans_of(mine), texts[0], spans_of(theirs), texts[1], most_tokens=most_tokens)
    num_bytes = own_end = their_end = 0
    for s0, s1, t0, t1 in zip(
        found.student_begins, found.student_ends, found.teacher_begins, found.teacher_ends, strict=True
    ):
        assert b"".join(mine[s0:s1]) == b"".join(theirs[t0:t1]) != b""
        assert own_end <= s0 < s1 <= s0 + most_tokens
        assert their_end <= t0 < t1 <= t0 + most_tokens
        own_end, their_end, num_bytes = s1, t1, num_bytes + len(b"".join(mine[s0:s1]))
    assert found.aligned_bytes == num_bytes


def cut(text: bytes, lengths: list[int]) -> list[bytes]:
    """Tokens of so many bytes, as long as there are some, and one of the rest."""
    edges = np.minimum(np.cumsum([0, *lengths]), len(text)).tolist()
    return [text[begin:end] for begin, end in zip(edges, [*edges[1:], len(text)], strict=True)]


def spans_of(tokens: list[bytes]) -> Spans:
    return Spans(token_ids=np.arange(len(tokens), dtype=np.int32), ends=np.cumsum([*map(len, tokens)], dtype=np.int32))


def test_texts_without_anything_in_common_have_no_chunks() -> None:
    found = aligned("byte_level", "byte_level", "aaaa", "zzzz")
    assert len(found.student_begins) == 0
    assert found.aligned_bytes == 0
    assert len(aligned("byte_level", "byte_level", "").student_begins) == 0


def test_a_chunk_of_too_many_tokens_is_left_out() -> None:
    text = "日本語の文章です。" * 3
    mine, theirs = spans("byte_level_small", text), spans("sentence_piece", text)
    counts = [align(mine, text.encode(), theirs, text.encode(), most_tokens=most).aligned_bytes for most in (1, 3, 100)]
    assert counts[0] < counts[1] <= counts[2] == len(text.encode())


def test_shared_tokens_stand_for_the_same_bytes_and_are_found_once() -> None:
    student, teacher = token_bytes(tokenizer("byte_level")), token_bytes(tokenizer("sentence_piece_bytes"))
    shared = shared_tokens(student, teacher, also=[(2, 2)])
    assert len(shared.student_ids) > 150
    assert len(set(shared.teacher_ids.tolist())) == len(shared.teacher_ids)
    for one, other in zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True):
        assert student[one] == teacher[other]
    assert (2, 2) in list(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))


def test_a_boundary_is_whitespace_that_no_token_has_behind_other_bytes() -> None:
    assert boundary_bytes([b" a", b"\n\n", None, b"a"], [b"  b", b"\ta"]) == b" \t\n\r"
    assert boundary_bytes([b" a", b";\n"], [b"a\t b"]) == b"\r"
    own, theirs = [None, b" a", b"b", b"\n", None], [b"x\n", b" ", b" b", b"a", None]
    found = boundary_tokens(own, theirs, ends=[(4, 4)])
    assert found is not None
    assert found.student_ids.tolist() == [1, 4]  # a newline does not count: the other has it inside a token
    assert found.teacher_ids.tolist() == [1, 2, 4]
    assert boundary_tokens([b"a b\t\n\r"], theirs, ends=[(0, 4)]) is None
    for one, other in (([b"a"], [b"b"]), ([b" a"], [b"b"]), ([b"a"], [b" b"])):
        assert boundary_tokens(one, other, ends=[]) is None


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_small", "sentence_piece_bytes"])
def test_a_space_begins_words_for_trained_tokenizers(kind: str) -> None:
    assert b" " in boundary_bytes(token_bytes(tokenizer(kind)))


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="WordLevel and the parts Whitespace cannot be aligned"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
