"""How rows are cut into chunks, blocks and tiles does not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.losses import engine, fused_linear_cross_entropy
from kdmesh.losses.matmul import spans
from tests.support.loss_cases import FULL, Case, assert_same, call, expected, heads, run, tensors


@given(length=st.integers(0, 5000), longest=st.integers(1, 600))
def test_spans_cover_everything_once_and_are_balanced(length: int, longest: int) -> None:
    found = spans(length, longest)
    assert [row for span in found for row in range(span.start, span.stop)] == list(range(length))
    sizes = [span.stop - span.start for span in found]
    assert all(0 < size <= longest for size in sizes)
    assert len(sizes) == -(-length // longest)
    if sizes:
        assert max(sizes) - sum(sizes) / len(sizes) < 16


@given(rows=st.integers(0, 10**6), vocabulary=st.integers(1, 10**6), chunk=st.none() | st.integers(1, 10**5))
def test_a_tile_fits_a_block_and_a_block_a_chunk(rows: int, vocabulary: int, chunk: int | None) -> None:
    sizes = engine.Sizes.choose(rows, vocabulary, torch.device("cpu"), chunk)
    assert 1 <= sizes.tile_rows <= sizes.block_rows <= sizes.chunk_rows <= max(rows, 1)
    assert 1 <= sizes.num_threads <= torch.get_num_threads()
    if chunk is not None:
        assert sizes.chunk_rows <= chunk


def test_what_a_call_holds_is_bounded_for_any_vocabulary() -> None:
    for vocabulary in (1000, 32_000, 128_256, 151_936, 262_144):
        sizes = engine.Sizes.choose(10**6, vocabulary, torch.device("cpu"))
        products_bytes = 2 * 4 * sizes.block_rows * vocabulary
        assert products_bytes <= max(2**28, 2 * 4 * 256 * vocabulary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_any_other_chunk_size(dtype: torch.dtype) -> None:
    case = replace(FULL, rows=50, vocabulary=200)
    inputs = tensors(case, dtype)
    whole = run(replace(case, chunk_tokens=50), inputs)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-7  # a bfloat16 gradient is rounded
    for chunk_tokens in (None, 1, 15, 16, 17, 49, 10_000):
        assert_same(run(replace(case, chunk_tokens=chunk_tokens), inputs), whole, tolerance=tolerance)


@pytest.mark.parametrize("sizes", [(100, 30, 7, 1), (64, 64, 1, 3), (37, 16, 16, 2), (150, 1, 1, 1), (150, 150, 2, 4)])
def test_blocks_tiles_and_threads_of_any_number_give_the_textbooks_gradient(
    sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, block, tile, num_threads = sizes
    fixed = engine.Sizes(chunk_rows=chunk, block_rows=block, tile_rows=tile, num_threads=num_threads)
    monkeypatch.setattr(engine.Sizes, "choose", staticmethod(lambda *_, **__: fixed))
    case = replace(FULL, rows=150)
    inputs = tensors(case, torch.float64)
    assert_same(run(case, inputs), expected(case, inputs), tolerance=1e-11)


def test_no_rows_give_a_zero_loss_and_zero_gradients() -> None:
    case = replace(FULL, rows=0)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tensors(case, dtype)
        outcome = run(case, inputs)
        assert outcome.loss_sum == 0
        for gradient, leaf in zip(outcome.gradients, inputs.leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()
        head, _ = heads(case, inputs)
        assert inputs.labels_R is not None
        loss = fused_linear_cross_entropy(inputs.student_hidden_RD, head, inputs.labels_R)
        gradients = torch.autograd.grad(loss.loss_sum, inputs.leaves)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_loss_can_be_propagated_twice_and_summed_over_micro_batches(dtype: torch.dtype) -> None:
    case = Case(rows=40)
    inputs = tensors(case, dtype)
    loss = call(case, inputs).loss_sum
    once = torch.autograd.grad(loss, inputs.leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, inputs.leaves)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)
    for _ in range(2):
        call(case, inputs).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert inputs.student_weight_VD.grad is not None
    torch.testing.assert_close(inputs.student_weight_VD.grad, twice[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_columns_have_the_gradient_of_rows(dtype: torch.dtype) -> None:
    case = replace(FULL, rows=40, student_size=16)
    inputs = tensors(case, dtype)
    columns_RD = inputs.student_hidden_RD.detach().t().contiguous().t().requires_grad_()
    found = run(case, replace(inputs, student_hidden_RD=columns_RD))
    assert_same(found, run(case, inputs), tolerance=1e-5 if dtype is torch.float32 else 2**-7)
