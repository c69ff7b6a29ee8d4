"""What an output head accepts, and what it makes of hidden states."""

from __future__ import annotations

import pytest
import torch

from kdmesh.errors import InvalidRequest
from kdmesh.losses import OutputHead


def test_logits_follow_the_stated_formula() -> None:
    torch.manual_seed(0)
    hidden_RD, weight_VD, bias_V = torch.randn(3, 4), torch.randn(7, 4), torch.randn(7)
    head = OutputHead(weight_VD=weight_VD, bias_V=bias_V, logit_scale=0.5, logit_softcap=3.0)
    expected_RV = 3.0 * torch.tanh(0.5 * (hidden_RD @ weight_VD.T + bias_V) / 3.0)
    torch.testing.assert_close(head.logits(hidden_RD), expected_RV)
    assert OutputHead(weight_VD=weight_VD.bfloat16()).logits(hidden_RD.bfloat16()).dtype is torch.float32


def test_a_cut_head_is_a_view_that_carries_gradients() -> None:
    weight_VD, bias_V = torch.randn(7, 4, requires_grad=True), torch.randn(7, requires_grad=True)
    head = OutputHead(weight_VD=weight_VD, bias_V=bias_V, logit_softcap=2.0)
    cut = head.sliced(5)
    assert (cut.vocabulary_size, cut.hidden_size, cut.logit_softcap) == (5, 4, 2.0)
    assert cut.weight_VD.data_ptr() == weight_VD.data_ptr()
    cut.logits(torch.ones(1, 4)).sum().backward()  # type: ignore[no-untyped-call]
    assert weight_VD.grad is not None
    assert weight_VD.grad[:5].all()
    assert not weight_VD.grad[5:].any()
    assert head.sliced(7) is head


def test_a_detached_head_carries_no_gradient() -> None:
    head = OutputHead(weight_VD=torch.ones(3, 2, requires_grad=True), bias_V=torch.ones(3, requires_grad=True))
    detached = head.detached()
    assert not detached.weight_VD.requires_grad
    assert detached.bias_V is not None
    assert not detached.bias_V.requires_grad


@pytest.mark.parametrize("vocabulary_size", [0, -1, 8])
def test_a_head_cannot_be_cut_to_tokens_it_has_not(vocabulary_size: int) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot be cut to {vocabulary_size}"):
        OutputHead(weight_VD=torch.ones(7, 2)).sliced(vocabulary_size)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight_VD": torch.ones(3)}, r"shape \(3,\)"),
        ({"weight_VD": torch.ones(3, 2), "bias_V": torch.ones(2)}, r"needs \[3\]"),
        ({"weight_VD": torch.ones(3, 2), "logit_softcap": 0.0}, "soft cap is 0.0"),
    ],
)
def test_a_head_of_another_form_is_refused(head: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        OutputHead(**head)  # type: ignore[arg-type]
