"""Divergences are found by name or import path, with their parameters checked first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.losses import (
    OutputHead,
    build_divergence,
    custom_divergence,
    forward_kl,
    fused_linear_divergence,
    jensen_shannon,
    reverse_kl,
)

# A divergence of one's own; docs/extending.md shows the same.
SKEWED_KL = '''
from math import log

import torch


def skewed_kl(log_q_CV, log_p_CV, *, skew):
    """KL(p || m) with m = skew p + (1 - skew) q: Ko et al. 2024 (DistiLLM), arXiv:2402.03898."""
    log_m_CV = torch.logaddexp(log_p_CV + log(skew), log_q_CV + log(1 - skew))
    p_CV = log_p_CV.exp()
    value_C = (p_CV * (log_p_CV - log_m_CV)).sum(-1)
    share_CV = (log_q_CV - log_m_CV).exp() * (1 - skew)  # of q in m
    return value_C, -p_CV * share_CV
'''


@pytest.fixture
def skewed_kl_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "kdmesh_test_divergence.py").write_text(SKEWED_KL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kdmesh_test_divergence", raising=False)
    return "kdmesh_test_divergence:skewed_kl"


def test_a_custom_divergence_has_the_gradient_of_its_formula(skewed_kl_module: str) -> None:
    torch.manual_seed(0)
    hidden_RD, weight_VD, teacher_RD = (torch.randn(n, 4, dtype=torch.float64) for n in (9, 30, 9))
    hidden_RD.requires_grad_()
    head = OutputHead(weight_VD=weight_VD)
    divergence = custom_divergence(skewed_kl_module, {"skew": 0.1})
    loss = fused_linear_divergence(hidden_RD, head, teacher_RD, head, divergence=divergence, chunk_tokens=4)

    p_RV = (teacher_RD @ weight_VD.T).softmax(-1)
    m_RV = 0.1 * p_RV + 0.9 * (hidden_RD @ weight_VD.T).softmax(-1)
    formula = (p_RV * (p_RV.log() - m_RV.log())).sum()
    torch.testing.assert_close(loss.loss_sum, formula)
    torch.testing.assert_close(torch.autograd.grad(loss.loss_sum, hidden_RD), torch.autograd.grad(formula, hidden_RD))


WRONG_SHAPES = """
def flat_gradient(log_q_CV, log_p_CV):
    return (log_p_CV - log_q_CV).sum(-1), log_q_CV[:, :1]


def scalar_value(log_q_CV, log_p_CV):
    return (log_p_CV - log_q_CV).sum(), -log_p_CV.exp()
"""


@pytest.mark.parametrize(
    ("function", "shapes"), [("flat_gradient", r"\(4,\) and \(4, 1\)"), ("scalar_value", r"\(\) and \(4, 30\)")]
)
def test_a_custom_divergence_of_the_wrong_shape_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, shapes: str
) -> None:
    (tmp_path / "kdmesh_test_shapes.py").write_text(WRONG_SHAPES)
    monkeypatch.syspath_prepend(str(tmp_path))
    divergence = custom_divergence(f"kdmesh_test_shapes:{function}", {})
    hidden_RD, head = torch.randn(4, 3), OutputHead(weight_VD=torch.randn(30, 3))
    with pytest.raises(InvalidRequest, match=rf"{function} returned tensors of shapes {shapes}; for \(4, 30\)"):
        fused_linear_divergence(hidden_RD, head, hidden_RD, head, divergence=divergence)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "missing params: skew"),
        ({"skew": 0.1, "lambda": 2}, "unknown params: lambda"),
        ({"skw": 0.1}, "unknown params: skw; missing params: skew"),
    ],
)
def test_params_that_do_not_fit_a_custom_divergence_are_named(
    skewed_kl_module: str, params: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_divergence(skewed_kl_module, params)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_anywhere:f", "cannot import"),
        ("math:no_such_function", "has no function"),
        ("kdmesh.errors:KdmeshError", "signature|must take"),
        ("math:sin", "must take 2 positional arguments"),
    ],
)
def test_what_cannot_be_a_divergence_is_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_divergence(target, {})


def test_built_in_divergences_are_found_by_name() -> None:
    log_q_CV, log_p_CV = torch.randn(2, 3, 5, dtype=torch.float64).log_softmax(-1)
    for name, params, function in (
        ("forward_kl", {}, forward_kl),
        ("reverse_kl", {}, reverse_kl),
        ("jensen_shannon", {"beta": 0.3}, lambda q, p: jensen_shannon(q, p, beta=0.3)),
    ):
        built = build_divergence(name, params)(log_q_CV.clone(), log_p_CV.clone())
        assert torch.equal(built[0], function(log_q_CV.clone(), log_p_CV.clone())[0])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("kl", {}, "unknown divergence 'kl'; known: forward_kl, reverse_kl, jensen_shannon"),
        ("forward_kl", {"beta": 0.1}, "unknown params: beta"),
        ("jensen_shannon", {}, "missing params: beta"),
        ("jensen_shannon", {"beta": 0.0}, "beta is 0.0"),
        ("jensen_shannon", {"beta": 1}, "beta is 1"),
    ],
)
def test_a_built_in_divergence_takes_its_own_params_and_no_others(
    name: str, params: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_divergence(name, params)
