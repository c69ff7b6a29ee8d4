"""Calls of the fused loss, and what the textbook says they come to; needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdmesh.losses import (
    Divergence,
    FusedLoss,
    OutputHead,
    SampledDivergence,
    Workspace,
    build_divergence,
    fused_linear_divergence,
    truncated,
)
from tests.support import textbook_losses as textbook
from tests.support.textbook_losses import Transform

PLAIN = Transform()

# The parameters of every divergence, from one number between 0.05 and 0.95.
PARAMS: Mapping[str, Callable[[float], dict[str, float]]] = {
    "forward_kl": lambda knob: {},
    "reverse_kl": lambda knob: {},
    "jensen_shannon": lambda knob: {"beta": knob},
    "skewed_kl": lambda knob: {"skew": knob},
    "skewed_reverse_kl": lambda knob: {"skew": knob},
    "total_variation": lambda knob: {},
    "renyi": lambda knob: {"order": 1.1 * knob if knob < 0.6 else 1.5 * knob + 0.2},
    "alpha_beta": lambda knob: {"alpha": knob, "beta": 1.3 - knob},
    "adaptive_kl": lambda knob: {"tail_mass": knob},
    "masked_reverse_kl": lambda knob: {},
    "entropy_gated_kl": lambda knob: {"threshold": 4 * knob, "forward_weight": 0.2 + knob},
    "top1_cross_entropy": lambda knob: {},
    "hierarchical_ranking": lambda knob: {"top_k": 2 + round(5 * knob)},
    "sampled_reverse_kl": lambda knob: {},
}
DIVERGENCES = list(PARAMS)
# Those that a rounding of the probabilities cannot move far: without a threshold, an order or a favourite.
SMOOTH = [*DIVERGENCES[:5], "renyi", "alpha_beta", "sampled_reverse_kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call; the tensors follow from `seed`."""

    seed: int = 0
    rows: int = 12
    vocabulary: int = 40
    padding: int = 0
    student_size: int = 6
    teacher_size: int = 9
    spread: float = 1.0  # standard deviation of the logits, about
    name: str = "forward_kl"
    knob: float = 0.5  # see PARAMS
    kept: tuple[str, float] | None = None  # what `truncated` keeps of each row
    temperature: float = 1.0
    has_labels: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    has_token_weights: bool = False
    student: Transform = PLAIN
    teacher: Transform = PLAIN
    has_bias: bool = False
    chunk_tokens: int | None = None
    upstream: float = 1.0

    @property
    def divergence(self) -> Divergence | SampledDivergence:
        """The one under test."""
        divergence = build_divergence(self.name, self.params)
        if self.kept is None:
            return divergence
        assert not isinstance(divergence, SampledDivergence)
        how, number = self.kept
        return truncated(divergence, top_k=int(number)) if how == "top_k" else truncated(divergence, top_p=number)

    @property
    def params(self) -> dict[str, float]:
        """Of the divergence."""
        return PARAMS[self.name](self.knob)


# Every option at once, none at its neutral value.
FULL = Case(
    rows=33,
    vocabulary=70,
    padding=5,
    temperature=1.7,
    kd_weight=0.6,
    ce_weight=0.4,
    has_token_weights=True,
    student=Transform(scale=0.8, softcap=4.0),
    teacher=Transform(scale=1.3, softcap=9.0),
    has_bias=True,
    chunk_tokens=8,
    upstream=-2.5,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensors:
    """Inputs of a case; the student's three require a gradient."""

    student_hidden_RD: Tensor
    student_weight_VD: Tensor
    student_bias_V: Tensor | None
    teacher_hidden_RE: Tensor
    teacher_weight_VE: Tensor
    teacher_bias_V: Tensor | None
    labels_R: Tensor | None
    token_weight_R: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """What carries a gradient."""
        leaves = [self.student_hidden_RD, self.student_weight_VD]
        return leaves if self.student_bias_V is None else [*leaves, self.student_bias_V]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """Of one call and its backward pass."""

    loss_sum: Tensor
    divergence_R: Tensor
    cross_entropy_R: Tensor
    gradients: list[Tensor]


def tensors(case: Case, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None) -> Tensors:
    """The inputs of `case`."""
    generator = torch.Generator().manual_seed(case.seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    padded = case.vocabulary + case.padding
    teacher_dtype = teacher_dtype or dtype
    return Tensors(
        student_hidden_RD=normal(case.rows, case.student_size).to(dtype).requires_grad_(),
        student_weight_VD=_weight(normal(padded, case.student_size), case).to(dtype).requires_grad_(),
        student_bias_V=normal(padded).to(dtype).requires_grad_() if case.has_bias else None,
        teacher_hidden_RE=normal(case.rows, case.teacher_size).to(teacher_dtype),
        teacher_weight_VE=_weight(normal(padded, case.teacher_size), case).to(teacher_dtype),
        teacher_bias_V=normal(padded).to(teacher_dtype) if case.has_bias else None,
        labels_R=torch.randint(case.vocabulary, (case.rows,), generator=generator) if case.has_labels else None,
        token_weight_R=torch.rand(case.rows, generator=generator) if case.has_token_weights else None,
    )


def _weight(normal_VD: Tensor, case: Case) -> Tensor:
    return normal_VD * case.spread / normal_VD.shape[1] ** 0.5


def heads(case: Case, inputs: Tensors) -> tuple[OutputHead, OutputHead]:
    """Student's and teacher's, without padding."""
    student = OutputHead(
        weight_VD=inputs.student_weight_VD,
        bias_V=inputs.student_bias_V,
        logit_scale=case.student.scale,
        logit_softcap=case.student.softcap,
    )
    teacher = OutputHead(
        weight_VD=inputs.teacher_weight_VE,
        bias_V=inputs.teacher_bias_V,
        logit_scale=case.teacher.scale,
        logit_softcap=case.teacher.softcap,
    )
    return student.sliced(case.vocabulary), teacher.sliced(case.vocabulary)


def call(
    case: Case,
    inputs: Tensors,
    *,
    with_entropies: bool = False,
    top_k: int = 0,
    workspace: Workspace | None = None,
) -> FusedLoss:
    """The loss under test."""
    student_head, teacher_head = heads(case, inputs)
    return fused_linear_divergence(
        inputs.student_hidden_RD,
        student_head,
        inputs.teacher_hidden_RE,
        teacher_head,
        divergence=case.divergence,
        temperature=case.temperature,
        labels_R=inputs.labels_R,
        kd_weight=case.kd_weight,
        ce_weight=case.ce_weight,
        token_weight_R=inputs.token_weight_R,
        with_entropies=with_entropies,
        top_k=top_k,
        chunk_tokens=case.chunk_tokens,
        workspace=workspace,
    )


def run(case: Case, inputs: Tensors) -> Outcome:
    """The loss under test, forward and backward."""
    loss = call(case, inputs)
    return Outcome(
        loss_sum=loss.loss_sum.detach(),
        divergence_R=loss.divergence_R,
        cross_entropy_R=loss.cross_entropy_R,
        gradients=list(torch.autograd.grad(loss.loss_sum * case.upstream, inputs.leaves)),
    )


def expected(case: Case, inputs: Tensors, *, target_RV: Tensor | None = None) -> Outcome:
    """The textbook's values and autograd's gradients, in float64; `target_RV` replaces the teacher's distribution."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    bias_V = leaves[2][: case.vocabulary] if case.has_bias else None
    teacher_bias_V = inputs.teacher_bias_V[: case.vocabulary] if inputs.teacher_bias_V is not None else None
    z_RV = textbook.logits(leaves[0], leaves[1][: case.vocabulary], bias_V, case.student)
    teacher_z_RV = textbook.logits(
        inputs.teacher_hidden_RE, inputs.teacher_weight_VE[: case.vocabulary], teacher_bias_V, case.teacher
    )
    q_RV = textbook.softmax(z_RV, case.temperature)
    p_RV = textbook.softmax(teacher_z_RV, case.temperature) if target_RV is None else target_RV
    divergence_R = _divergence(case, q_RV, p_RV, inputs.labels_R)
    cross_entropy_R = z_RV.new_empty(0)
    loss_R = case.kd_weight * divergence_R
    if inputs.labels_R is not None:
        cross_entropy_R = textbook.cross_entropy(z_RV, inputs.labels_R)
        loss_R = loss_R + case.ce_weight * cross_entropy_R
    if inputs.token_weight_R is not None:
        loss_R = loss_R * inputs.token_weight_R.double()
    loss_sum = loss_R.sum()
    return Outcome(
        loss_sum=loss_sum.detach(),
        divergence_R=divergence_R.detach(),
        cross_entropy_R=cross_entropy_R.detach(),
        gradients=list(torch.autograd.grad(loss_sum * case.upstream, leaves)),
    )


def _divergence(case: Case, q_RV: Tensor, p_RV: Tensor, labels_R: Tensor | None) -> Tensor:
    if case.kept is None:
        return textbook.divergence(case.name, q_RV, p_RV, case.params, labels_R)
    how, number = case.kept
    if how == "top_p":
        is_merged_RV = textbook.in_tail(p_RV, 1 - number)
    else:
        is_merged_RV = p_RV.argsort(-1, descending=True).argsort(-1) >= int(number)
    rows = textbook.truncated(q_RV, p_RV, is_merged_RV)
    return torch.cat([textbook.divergence(case.name, q_1K, p_1K, case.params, None) for q_1K, p_1K in rows])


def assert_same(actual: Outcome, reference: Outcome, *, tolerance: float) -> None:
    """Every tensor within `tolerance` of its own scale, or of 1 where that is less."""

    def close(mine: Tensor, theirs: Tensor) -> None:
        assert mine.shape == theirs.shape
        allowed = tolerance * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=allowed)

    close(actual.loss_sum, reference.loss_sum)
    close(actual.divergence_R, reference.divergence_R)
    close(actual.cross_entropy_R, reference.cross_entropy_R)
    for mine, theirs in zip(actual.gradients, reference.gradients, strict=True):
        close(mine, theirs)
