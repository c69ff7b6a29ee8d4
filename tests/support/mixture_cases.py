"""Calls of the fused loss with a mixture of teachers, and what the textbook says they come to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdmesh.losses import FusedLoss, MixedTeacher, OutputHead, fused_linear_divergence
from tests.support import loss_cases as single
from tests.support import textbook_losses as textbook
from tests.support.loss_cases import Case, Outcome, Tensors
from tests.support.textbook_losses import Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Further:
    """One more teacher."""

    size: int = 4
    share: float = 1.0  # of the target, beside the first teacher's 1
    own_tokens: int = 0  # real tokens beyond those that all have
    has_bias: bool = False
    transform: Transform = single.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureTensors:
    """Inputs of a mixture's case."""

    own: Tensors  # the student's, and the first teacher's
    further: list[MixedTeacher]  # heads over all of their own tokens


def tensors(case: Case, further: list[Further], dtype: torch.dtype) -> MixtureTensors:
    """The inputs of `case` with more teachers."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    total = 1 + sum(each.share for each in further)
    teachers = []
    for each in further:
        tokens = case.vocabulary + each.own_tokens
        head = OutputHead(
            weight_VD=(normal(tokens, each.size) * case.spread / each.size**0.5).to(dtype),
            bias_V=normal(tokens).to(dtype) if each.has_bias else None,
            logit_scale=each.transform.scale,
            logit_softcap=each.transform.softcap,
        )
        hidden_RE = normal(case.rows, each.size).to(dtype)
        teachers.append(MixedTeacher(hidden_RE=hidden_RE, head=head, weight=each.share / total))
    return MixtureTensors(own=single.tensors(case, dtype), further=teachers)


def call(case: Case, inputs: MixtureTensors, *, with_entropies: bool = False, top_k: int = 0) -> FusedLoss:
    """The loss under test."""
    student_head, teacher_head = single.heads(case, inputs.own)
    return fused_linear_divergence(
        inputs.own.student_hidden_RD,
        student_head,
        inputs.own.teacher_hidden_RE,
        teacher_head,
        divergence=case.divergence,
        mixed_with=[
            MixedTeacher(hidden_RE=each.hidden_RE, head=each.head.sliced(case.vocabulary), weight=each.weight)
            for each in inputs.further
        ],
        temperature=case.temperature,
        labels_R=inputs.own.labels_R,
        kd_weight=case.kd_weight,
        ce_weight=case.ce_weight,
        token_weight_R=inputs.own.token_weight_R,
        with_entropies=with_entropies,
        top_k=top_k,
        chunk_tokens=case.chunk_tokens,
    )


def run(case: Case, inputs: MixtureTensors) -> Outcome:
    """The loss under test, forward and backward."""
    loss = call(case, inputs)
    return Outcome(
        loss_sum=loss.loss_sum.detach(),
        divergence_R=loss.divergence_R,
        cross_entropy_R=loss.cross_entropy_R,
        gradients=list(torch.autograd.grad(loss.loss_sum * case.upstream, inputs.own.leaves)),
    )


def target(case: Case, inputs: MixtureTensors) -> Tensor:
    """[R, V] the textbook's mixture of probabilities, float64."""
    own = inputs.own
    bias_V = None if own.teacher_bias_V is None else own.teacher_bias_V[: case.vocabulary]
    z_RV = textbook.logits(own.teacher_hidden_RE, own.teacher_weight_VE[: case.vocabulary], bias_V, case.teacher)
    p_RV = (1 - sum(each.weight for each in inputs.further)) * textbook.softmax(z_RV, case.temperature)
    for each in inputs.further:
        bias_V = None if each.head.bias_V is None else each.head.bias_V[: case.vocabulary]
        transform = Transform(scale=each.head.logit_scale, softcap=each.head.logit_softcap)
        z_RV = textbook.logits(each.hidden_RE, each.head.weight_VD[: case.vocabulary], bias_V, transform)
        p_RV = p_RV + each.weight * textbook.softmax(z_RV, case.temperature)
    return p_RV


def expected(case: Case, inputs: MixtureTensors) -> Outcome:
    """The textbook's values and autograd's gradients, in float64."""
    return single.expected(case, inputs.own, target_RV=target(case, inputs))
