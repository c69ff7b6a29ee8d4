"""oneDNN's matrix kernel multiplies what it says it takes."""

from __future__ import annotations

import pytest
import torch

from kdmesh.losses import brgemm
from kdmesh.losses.matmul import hidden_gradient_into, logits_into, weight_gradient_into
from kdmesh.losses.workspace import Workspace

_SHAPES = [(1, 1, 2), (3, 300, 64), (37, 5, 130), (700, 257, 514)]  # rows, columns, inner size


@pytest.mark.skipif(not brgemm.takes(torch.zeros(2, 2)), reason="needs a processor with AVX-512")
@pytest.mark.parametrize(("rows", "columns", "inner"), _SHAPES)
def test_float32_products_are_those_of_float64(rows: int, columns: int, inner: int) -> None:
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    before = torch.randn(rows, columns + 7)
    out = before.clone()
    brgemm.multiply_into(out[:, 3 : 3 + columns], left, brgemm.transposed(right))
    exact = left.double() @ right.double().T
    torch.testing.assert_close(out[:, 3 : 3 + columns].double(), exact, rtol=1e-5, atol=1e-4)
    untouched = [i for i in range(columns + 7) if not 3 <= i < 3 + columns]
    assert torch.equal(out[:, untouched], before[:, untouched])


@pytest.mark.skipif(
    not brgemm.takes(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="needs a processor that multiplies bfloat16"
)
@pytest.mark.parametrize(("rows", "columns", "inner"), _SHAPES)
def test_bfloat16_products_are_not_rounded(rows: int, columns: int, inner: int) -> None:
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    out = torch.empty(rows, columns)
    brgemm.multiply_into(out, left, brgemm.transposed(right))
    torch.testing.assert_close(out.double(), left.double() @ right.double().T, rtol=1e-5, atol=1e-4)


def test_what_it_cannot_multiply_is_not_taken() -> None:
    assert not brgemm.takes(torch.zeros(4, 4, dtype=torch.float64))
    assert not brgemm.takes(torch.zeros(4, 4).T)
    assert not brgemm.takes(torch.zeros(4, 5, dtype=torch.bfloat16))
    assert not brgemm.takes(torch.zeros(4, 8, dtype=torch.bfloat16)[:, 1:7])


def test_a_limit_on_the_processors_instructions_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert brgemm._kernel.__wrapped__(torch.float32) is None


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 1e-1)])
def test_the_products_of_the_loss_are_the_same_without_it(
    dtype: torch.dtype, rtol: float, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_CD, weight_VD, gradient_CV = (torch.randn(*shape).to(dtype) for shape in [(45, 32), (600, 32), (45, 600)])

    def products() -> list[torch.Tensor]:
        logits_CV, hidden_gradient_CD, weight_gradient_VD = torch.empty(45, 600), hidden_CD.clone(), torch.ones(600, 32)
        logits_into(logits_CV, hidden_CD, weight_VD, Workspace())
        hidden_gradient_into(hidden_gradient_CD, gradient_CV, weight_VD)
        weight_gradient_into(weight_gradient_VD, gradient_CV, hidden_CD, adds=True)
        return [logits_CV, hidden_gradient_CD, weight_gradient_VD]

    found = products()
    monkeypatch.setattr(brgemm, "takes", lambda matrix: False)
    for with_it, without_it in zip(found, products(), strict=True):
        torch.testing.assert_close(with_it, without_it, rtol=rtol, atol=atol)
