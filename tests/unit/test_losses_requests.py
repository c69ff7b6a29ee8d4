"""A call of the fused loss that makes no sense is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdmesh.errors import InvalidRequest
from kdmesh.losses import OutputHead, forward_kl, fused_linear_cross_entropy, fused_linear_divergence

GOOD: dict[str, Any] = {
    "student_hidden_RD": torch.ones(5, 2),
    "student_head": OutputHead(weight_VD=torch.ones(9, 2)),
    "teacher_hidden_RE": torch.ones(5, 3),
    "teacher_head": OutputHead(weight_VD=torch.ones(9, 3)),
    "divergence": forward_kl,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden_RD": torch.ones(5, 3)}, r"student's hidden states have shape \(5, 3\)"),
        ({"teacher_hidden_RE": torch.ones(5)}, r"teacher's hidden states have shape \(5,\)"),
        ({"teacher_hidden_RE": torch.ones(4, 3)}, "teacher_hidden_RE has 4 rows.*5"),
        ({"teacher_head": OutputHead(weight_VD=torch.ones(10, 3))}, "9 tokens, the teacher's 10"),
        ({"labels_R": torch.zeros(6, dtype=torch.int64)}, "labels_R has 6 rows"),
        ({"token_weight_R": torch.ones(1)}, "token_weight_R has 1 rows"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"ce_weight": 0.1}, "ce_weight is 0.1 without labels"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_it_is_refused_with_the_value_and_the_rule(change: dict[str, Any], message: str) -> None:
    fused_linear_divergence(**GOOD)
    with pytest.raises(InvalidRequest, match=message):
        fused_linear_divergence(**{**GOOD, **change})


def test_cross_entropy_alone_is_checked_too() -> None:
    head = OutputHead(weight_VD=torch.ones(9, 2))
    with pytest.raises(InvalidRequest, match="labels_R has 4 rows"):
        fused_linear_cross_entropy(torch.ones(5, 2), head, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InvalidRequest, match="chunk_tokens is -1"):
        fused_linear_cross_entropy(torch.ones(5, 2), head, torch.zeros(5, dtype=torch.int64), chunk_tokens=-1)
