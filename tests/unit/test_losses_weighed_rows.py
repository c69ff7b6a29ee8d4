"""The divergences of docs/losses.md that weigh rows, as they stand there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmesh.losses import OutputHead, custom_divergence, fused_linear_divergence

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
MODULE = "my_tokens"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the page's module, which can be imported."""
    found = re.search(rf"^`{MODULE}.py`:\n\n```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    (tmp_path / f"{MODULE}.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield MODULE
    sys.modules.pop(MODULE, None)


def entropy(probabilities_RV: Tensor) -> Tensor:
    entropy_R: Tensor = torch.special.entr(probabilities_RV).sum(-1)
    return entropy_R


@pytest.mark.parametrize(
    ("name", "params", "weights"),
    [
        ("unsure_kl", {"above_nats": 2.6}, lambda q_RV, p_RV: (entropy(q_RV) > 2.6).double()),
        ("confident_kl", {}, lambda q_RV, p_RV: 1 - entropy(p_RV) / log(30)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_count_what_the_formula_says_and_the_weight_has_no_gradient(
    module: str, name: str, params: dict[str, Any], weights: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden_RD, weight_VD, teacher_RD = (torch.randn(rows, 8, generator=generator).to(dtype) for rows in (40, 30, 40))
    weight_VD *= 0.5
    leaves = [hidden_RD.requires_grad_(), weight_VD.requires_grad_()]
    loss = fused_linear_divergence(
        hidden_RD,
        OutputHead(weight_VD=weight_VD),
        teacher_RD,
        OutputHead(weight_VD=weight_VD.detach()),
        divergence=custom_divergence(f"{module}:{name}", params),
        temperature=1.5,
    )
    found = torch.autograd.grad(loss.loss_sum, leaves)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q_RV = (wide[0] @ wide[1].T / 1.5).softmax(-1)
    p_RV = (teacher_RD.double() @ wide[1].detach().T / 1.5).softmax(-1)
    weight_R = weights(q_RV, p_RV).detach()
    assert 0 < weight_R.mean() < 1
    value_R = weight_R * (p_RV * (p_RV.log() - q_RV.log())).sum(-1)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-2
    torch.testing.assert_close(loss.divergence_R.double(), value_R, rtol=min(tolerance, 1e-4), atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(value_R.sum(), wide), strict=True):
        assert (one - other).norm() < tolerance * other.norm()
