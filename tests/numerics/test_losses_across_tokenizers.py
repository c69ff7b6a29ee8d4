"""Losses between distributions over two vocabularies, against textbook formulas in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kdmesh.alignment.chunks import align
from kdmesh.alignment.spans import spans_of_text
from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.errors import InvalidRequest
from kdmesh.losses import engine
from kdmesh.losses.head import OutputHead
from kdmesh.losses.two_vocabularies.across_vocabularies import fused_linear_by_rank, fused_linear_hybrid
from kdmesh.losses.two_vocabularies.chunk_likelihood import Boundaries, binary_kl, fused_linear_chunk_likelihood
from kdmesh.losses.two_vocabularies.labelled import ChunkLoss, ChunkRows, LabelledRows
from kdmesh.losses.two_vocabularies.sorted_rows import HybridWeights, Matched
from tests.support.chunk_cases import (
    ChunkCase,
    ChunkInputs,
    TextbookEnds,
    cases,
    expected,
    expected_debiased,
    inputs,
    likelihood,
    outcome,
)
from tests.support.tensor_watch import TensorWatch
from tests.support.trained_tokenizers import TEXTS, tokenizer

THREE = ("byte_level", "sentence_piece_bytes", "word_piece")
TAUS = (1.0, 7.0, 100.0)
WEIGHTS = HybridWeights(beta=0.3, matched=0.6, unmatched=0.4)


def matched_of(case: ChunkCase) -> Matched:
    """Every second token of the smaller vocabulary, in another order on the other side."""
    student_M = torch.arange(0, min(case.own_vocabulary, case.their_vocabulary) - 1, 2)
    return Matched(student_M=student_M, teacher_M=student_M.flip(0) + 1)


def assert_alike(one: list[Tensor], other: list[Tensor], *, tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def textbook_binary(log_q: Tensor, log_p: Tensor, tau: float) -> Tensor:
    b, a = (log_q / tau - 1e-6).exp(), (log_p / tau - 1e-6).exp()
    return tau * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())


def textbook_likelihood(case: ChunkCase, made: ChunkInputs, tau: float) -> list[Tensor]:
    def of_chunk(log_q: Tensor, own: Tensor, log_p: Tensor, their: Tensor) -> Tensor:
        return textbook_binary(likelihood(log_q, own), likelihood(log_p, their), tau)

    return expected(made, of_chunk, 1.0)


def followed(chunks: ChunkRows) -> Tensor:
    """[C] whether the next chunk begins where this one ends, on both sides."""
    joins = (chunks.student_ends_C[:-1] == chunks.student_begins_C[1:]) & (
        chunks.teacher_ends_C[:-1] == chunks.teacher_begins_C[1:]
    )
    return torch.cat([joins, torch.zeros(min(chunks.num_chunks, 1), dtype=torch.bool)])


def by_rank(q: Tensor, p: Tensor) -> Tensor:
    width = max(len(q), len(p))
    padded = [
        torch.cat([values.sort(descending=True).values, values.new_zeros(width - len(values))]) for values in (q, p)
    ]
    return (padded[0] - padded[1]).abs().sum()


def textbook_hybrid(case: ChunkCase, made: ChunkInputs, matched: Matched, weights: HybridWeights) -> list[Tensor]:
    own_rest, their_rest = (
        [token for token in range(size) if token not in known.tolist()]
        for size, known in ((case.own_vocabulary, matched.student_M), (case.their_vocabulary, matched.teacher_M))
    )

    def of_chunk(log_q: Tensor, own: Tensor, log_p: Tensor, their: Tensor) -> Tensor:
        q = log_q[0].exp() * likelihood(log_q[1:], own[1:]).exp()
        p = log_p[0].exp() * likelihood(log_p[1:], their[1:]).exp()
        same_q, same_p = q[matched.student_M], p[matched.teacher_M]
        m = weights.beta * same_p + (1 - weights.beta) * same_q
        same = weights.beta * (same_p * (same_p / m).log()) + (1 - weights.beta) * (same_q * (same_q / m).log())
        return weights.matched * same.sum() + weights.unmatched * by_rank(q[own_rest], p[their_rest])

    return expected(made, of_chunk, case.temperature)


def run_hybrid(case: ChunkCase, made: ChunkInputs, chunk_tokens: int | None = None) -> ChunkLoss:
    return fused_linear_hybrid(
        made.student,
        made.teacher,
        made.chunks,
        matched=matched_of(case),
        weights=WEIGHTS,
        temperature=case.temperature,
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("tau", TAUS)
def test_chunk_likelihoods_are_the_textbooks(tau: float) -> None:
    @settings(max_examples=6)
    @given(case=cases())
    def check(case: ChunkCase) -> None:
        made = inputs(case)
        loss = fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=tau)
        assert_alike(outcome(loss, made), textbook_likelihood(case, made, tau), tolerance=1e-9)

    check()


def test_a_known_likelihood_of_the_student_changes_nothing() -> None:
    made = inputs(ChunkCase())
    loss = fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=5.0)
    known = fused_linear_chunk_likelihood(
        made.student,
        made.teacher,
        made.chunks,
        tau=5.0,
        student_log_likelihood_R=made.student.log_likelihoods(),
    )
    assert_alike(outcome(known, made), outcome(loss, made), tolerance=1e-12)


@pytest.mark.parametrize("least", [0.0, 0.3, 0.9])
def test_chunk_likelihoods_with_what_may_follow_are_the_textbooks(least: float) -> None:
    @settings(max_examples=6)
    @given(case=cases())
    def check(case: ChunkCase) -> None:
        made = inputs(case)
        followed_C = followed(made.chunks)
        boundaries = Boundaries(
            student_B=torch.arange(0, case.own_vocabulary, 3),
            teacher_B=torch.arange(1, case.their_vocabulary, 2),
            least=least,
        )
        ends = TextbookEnds(
            followed=followed_C.tolist(),
            student_tokens=boundaries.student_B.tolist(),
            teacher_tokens=boundaries.teacher_B.tolist(),
            least=least,
        )
        loss = fused_linear_chunk_likelihood(
            made.student,
            made.teacher,
            made.chunks,
            tau=7.0,
            boundaries=boundaries,
            followed_F=followed_C.nonzero()[:, 0],
        )
        textbook = expected_debiased(made, ends, lambda log_q, log_p: textbook_binary(log_q, log_p, 7.0))
        assert_alike(outcome(loss, made), textbook, tolerance=1e-9)

    check()


WORDS = {b" a": 0.3, b" ab": 0.25, b" abc": 0.2, b" b": 0.15, b" bc": 0.1}
# What stands for itself; the others are as many tokens as letters.
CUT = {"letters": (b" ", b"a", b"b", b"c"), "some words": (b" a", b" ab", b"b", b"c", b" b"), "words": tuple(WORDS)}


def tokenized(pieces: tuple[bytes, ...], word: bytes) -> list[int]:
    """By the longest piece that fits."""
    ids = []
    while word:
        longest = max((piece for piece in pieces if word.startswith(piece)), key=len)
        ids.append(pieces.index(longest))
        word = word[len(longest) :]
    return ids


def side_of_the_truth(pieces: tuple[bytes, ...], word: bytes) -> LabelledRows:
    """Rows for each token of the word and for what follows, whose head is the identity: log p of the next token.

    p is exact, of texts that are one of WORDS and another one behind it, for this way of cutting texts into tokens.
    """
    texts: dict[tuple[int, ...], float] = {}
    for (first, p), (second, q) in itertools.product(WORDS.items(), repeat=2):
        ids = tuple(tokenized(pieces, first) + tokenized(pieces, second))
        texts[ids] = texts.get(ids, 0.0) + p * q
    labels = tokenized(pieces, word)
    rows = []
    for begun in range(len(labels) + 1):
        alike = {ids: p for ids, p in texts.items() if ids[:begun] == tuple(labels[:begun])}
        p_V = torch.full((len(pieces),), 1e-300, dtype=torch.float64)
        for ids, p in alike.items():
            p_V[ids[begun]] += p / sum(alike.values())
        rows.append(p_V.log())
    eye = torch.eye(len(pieces), dtype=torch.float64)
    labels_R = torch.tensor([*labels, 0])
    return LabelledRows(hidden_RD=torch.stack(rows), head=OutputHead(weight_VD=eye), labels_R=labels_R)


@pytest.mark.parametrize("pair", list(itertools.permutations(CUT, 2)), ids="/".join)
def test_models_that_agree_on_every_text_have_no_loss_however_they_cut_it_once_words_must_end(
    pair: tuple[str, str],
) -> None:
    own, their = (CUT[name] for name in pair)
    biased = 0.0
    for word in WORDS:
        student, teacher = side_of_the_truth(own, word), side_of_the_truth(their, word)
        # The word, and behind it a row of each that tells what comes next.
        chunks = ChunkRows(
            student_begins_C=torch.tensor([0, len(student.labels_R) - 1]),
            student_ends_C=torch.tensor([len(student.labels_R) - 1, len(student.labels_R)]),
            teacher_begins_C=torch.tensor([0, len(teacher.labels_R) - 1]),
            teacher_ends_C=torch.tensor([len(teacher.labels_R) - 1, len(teacher.labels_R)]),
        )
        begins = [torch.tensor([n for n, piece in enumerate(p) if piece[:1] == b" "]) for p in (own, their)]
        boundaries = Boundaries(student_B=begins[0], teacher_B=begins[1], least=0.0)
        loss = fused_linear_chunk_likelihood(
            student,
            teacher,
            chunks,
            tau=1.0,
            boundaries=boundaries,
            followed_F=torch.tensor([0]),
        )
        assert abs(loss.divergence_C[0]) < 1e-9
        biased += fused_linear_chunk_likelihood(student, teacher, chunks, tau=1.0).divergence_C[0].item()
    assert biased > 0.01


def test_boundaries_need_to_know_what_is_followed() -> None:
    made = inputs(ChunkCase())
    boundaries = Boundaries(student_B=torch.arange(2), teacher_B=torch.arange(2), least=0.0)
    with pytest.raises(InvalidRequest, match="boundaries need followed_F"):
        fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=1.0, boundaries=boundaries)


def test_probabilities_by_rank_are_the_textbooks() -> None:
    @settings(max_examples=10)
    @given(case=cases())
    def check(case: ChunkCase) -> None:
        made = inputs(case)
        loss = fused_linear_by_rank(made.student, made.teacher, made.chunks, temperature=case.temperature)
        of_first = expected(made, lambda q, _, p, __: by_rank(q[0].exp(), p[0].exp()), case.temperature)
        assert_alike(outcome(loss, made), of_first, tolerance=1e-11)

    check()


def test_the_hybrid_is_the_textbooks() -> None:
    @settings(max_examples=10)
    @given(case=cases())
    def check(case: ChunkCase) -> None:
        made = inputs(case)
        assert_alike(
            outcome(run_hybrid(case, made), made),
            textbook_hybrid(case, made, matched_of(case), WEIGHTS),
            tolerance=1e-10,
        )

    check()


@pytest.mark.parametrize("sizes", [(5, 5, 2, 1), (4, 3, 1, 2), (64, 16, 16, 4)])
def test_chunks_blocks_tiles_and_threads_of_any_number_give_the_textbooks_gradient(
    sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, block, tile, num_threads = sizes
    fixed = engine.Sizes(chunk_rows=chunk, block_rows=block, tile_rows=tile, num_threads=num_threads)
    monkeypatch.setattr(engine.Sizes, "choose", staticmethod(lambda *_, **__: fixed))
    case = ChunkCase(lengths=[(1, 1), (2, 1), (1, 3)] * 9, temperature=1.4)
    made = inputs(case)
    assert_alike(
        outcome(run_hybrid(case, made), made), textbook_hybrid(case, made, matched_of(case), WEIGHTS), tolerance=1e-10
    )


def test_float32_is_as_near_as_its_rounding() -> None:
    case = ChunkCase(lengths=[(1, 1), (2, 1), (1, 3)] * 5)
    made = inputs(case, torch.float32)
    assert_alike(
        outcome(run_hybrid(case, made), made), textbook_hybrid(case, made, matched_of(case), WEIGHTS), tolerance=2e-5
    )
    loss = fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=20.0)
    assert_alike(outcome(loss, made), textbook_likelihood(case, made, 20.0), tolerance=2e-4)


def test_all_are_zero_for_equals_and_never_below() -> None:
    case = ChunkCase(lengths=[(1, 1), (2, 2), (3, 3)], own_vocabulary=19, their_vocabulary=19)
    made = inputs(case)
    same = replace(made, teacher=made.student)
    matched = Matched(student_M=torch.arange(10), teacher_M=torch.arange(10))
    losses: dict[str, Callable[[ChunkInputs], ChunkLoss]] = {
        "likelihood": lambda of: fused_linear_chunk_likelihood(of.student, of.teacher, of.chunks, tau=10.0),
        "rank": lambda of: fused_linear_by_rank(of.student, of.teacher, of.chunks),
        "hybrid": lambda of: fused_linear_hybrid(of.student, of.teacher, of.chunks, matched=matched, weights=WEIGHTS),
    }
    for name, loss in losses.items():
        assert loss(same).divergence_C.abs().max() < 1e-12, name
        assert loss(made).divergence_C.min() > 1e-5, name


def test_a_likelihood_far_below_or_near_one_keeps_a_finite_gradient() -> None:
    log_q_C = torch.tensor([0.0, -1e-9, -800.0, -1e5], dtype=torch.float64)
    for log_p_C in (log_q_C, log_q_C.flip(0)):
        value_C, slope_C = binary_kl(log_q_C, log_p_C, tau=1.0)
        assert value_C.isfinite().all()
        assert slope_C.isfinite().all()


@pytest.mark.parametrize("tau", [1e4, 1e6, 1e9])
def test_with_a_large_tau_the_binary_divergence_compares_the_logarithms(tau: float) -> None:
    log_q_C, log_p_C = -torch.rand(2, 50, dtype=torch.float64) * 20 - 0.1
    value_C, slope_C = binary_kl(log_q_C, log_p_C, tau=tau)
    limit_C = -log_p_C * (log_p_C / log_q_C).log() + log_p_C - log_q_C
    torch.testing.assert_close(value_C, limit_C, rtol=0.02, atol=0.002)
    torch.testing.assert_close(slope_C, log_p_C / log_q_C - 1, rtol=0.02, atol=0.002)
    assert (slope_C.sign() == (log_q_C - log_p_C).sign()).all()


def test_no_matrix_of_all_rows_and_the_vocabulary_is_built() -> None:
    rows, vocabulary = 600, 3000
    case = ChunkCase(lengths=[(1, 1), (2, 1)] * (rows // 3), own_vocabulary=vocabulary, their_vocabulary=vocabulary + 9)
    made = inputs(case, torch.float32)
    with TensorWatch() as watch:
        outcome(run_hybrid(case, made, chunk_tokens=16), made)
    assert watch.largest_bytes < rows * vocabulary * 4 / 2


def test_numbers_out_of_range_are_refused() -> None:
    made = inputs(ChunkCase())
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidRequest, match="it must be positive"):
            fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=tau)
    with pytest.raises(InvalidRequest, match="temperature is 0"):
        fused_linear_by_rank(made.student, made.teacher, made.chunks, temperature=0)
    with pytest.raises(InvalidRequest, match="between 0 and 1"):
        fused_linear_hybrid(
            made.student,
            made.teacher,
            made.chunks,
            matched=matched_of(ChunkCase()),
            weights=replace(WEIGHTS, beta=1.0),
        )


@pytest.mark.parametrize("pair", list(itertools.permutations(THREE, 2)), ids="/".join)
def test_what_trained_tokenizers_make_of_a_text_is_compared_as_the_textbook_does(pair: tuple[str, str]) -> None:
    text = TEXTS[6][100:300]
    own, their = (spans_of_text(tokenizer(kind), text, token_bytes(tokenizer(kind))) for kind in pair)
    found = align(own, text.encode(), their, text.encode(), most_tokens=1000)
    chunks = ChunkRows(
        student_begins_C=torch.from_numpy(found.student_begins.astype(np.int64)),
        student_ends_C=torch.from_numpy(found.student_ends.astype(np.int64)),
        teacher_begins_C=torch.from_numpy(found.teacher_begins.astype(np.int64)),
        teacher_ends_C=torch.from_numpy(found.teacher_ends.astype(np.int64)),
    )
    sizes = [len(tokenizer(kind)) for kind in pair]
    case = ChunkCase(
        lengths=[(len(own.token_ids), len(their.token_ids))], own_vocabulary=sizes[0], their_vocabulary=sizes[1]
    )
    made = inputs(case)
    made = replace(
        made,
        student=replace(made.student, labels_R=torch.from_numpy(own.token_ids.astype(np.int64))),
        teacher=replace(made.teacher, labels_R=torch.from_numpy(their.token_ids.astype(np.int64))),
        chunks=chunks,
    )
    assert found.aligned_bytes > 0.8 * len(text.encode())
    loss = fused_linear_chunk_likelihood(made.student, made.teacher, made.chunks, tau=20.0)
    assert_alike(outcome(loss, made), textbook_likelihood(case, made, 20.0), tolerance=1e-9)
    assert_alike(
        outcome(run_hybrid(case, made), made), textbook_hybrid(case, made, matched_of(case), WEIGHTS), tolerance=1e-9
    )
