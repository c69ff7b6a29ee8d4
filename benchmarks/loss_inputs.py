"""The ways of computing one distillation loss and its gradients that the loss benchmark compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdmesh.losses import (
    Divergence,
    OutputHead,
    SampledDivergence,
    Workspace,
    forward_kl,
    fused_linear_divergence,
)
from kdmesh.processor import multiplies

STUDENT_SIZE, TEACHER_SIZE = 512, 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """Of one type; the student's two carry a gradient."""

    student_RD: Tensor
    student_VD: Tensor
    teacher_RE: Tensor
    teacher_VE: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What is differentiated."""
        return self.student_RD, self.student_VD


Method = Callable[[Inputs], Tensor]  # the summed forward KL, ready for backward


def measured_dtype() -> torch.dtype:
    """bfloat16; float32 on a processor without its instructions, where torch's products take a hundred times longer."""
    return torch.bfloat16 if multiplies(torch.bfloat16, torch.device("cpu")) else torch.float32


def inputs(rows: int, vocabulary: int, *, distance: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """A student whose logits differ from its teacher's by about `distance`; the teacher's reach about 24."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, deviation: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * deviation).to(dtype)

    student_RD = normal(rows, STUDENT_SIZE, 1.0)
    student_VD = normal(vocabulary, STUDENT_SIZE, 5.0 / STUDENT_SIZE**0.5)
    more = TEACHER_SIZE - STUDENT_SIZE
    return Inputs(
        # The teacher is the student, and something more that the student has no part of.
        teacher_RE=torch.cat([student_RD, normal(rows, more, 1.0)], dim=1),
        teacher_VE=torch.cat([student_VD, normal(vocabulary, more, distance / more**0.5)], dim=1),
        student_RD=student_RD.requires_grad_(),
        student_VD=student_VD.requires_grad_(),
    )


def formula(student_RV: Tensor, teacher_RV: Tensor) -> Tensor:
    """[] the textbook's, softmax in float32: what KDFlow compiles."""
    log_q_RV = torch.log_softmax(student_RV, -1, dtype=torch.float32)
    log_p_RV = torch.log_softmax(teacher_RV, -1, dtype=torch.float32)
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).sum()


def _with_products(student_RD: Tensor, student_VD: Tensor, teacher_RE: Tensor, teacher_VE: Tensor) -> Tensor:
    return formula(student_RD @ student_VD.T, teacher_RE @ teacher_VE.T)


def fused(
    x: Inputs,
    *,
    divergence: Divergence | SampledDivergence = forward_kl,
    workspace_of: Callable[[], Workspace] | None = None,
) -> Tensor:
    """[] ours. Without a workspace the scratch is what the thread keeps."""
    student, teacher = OutputHead(weight_VD=x.student_VD), OutputHead(weight_VD=x.teacher_VE)
    labels_R = torch.zeros(len(x.student_RD), dtype=torch.int64) if isinstance(divergence, SampledDivergence) else None
    return fused_linear_divergence(
        x.student_RD,
        student,
        x.teacher_RE,
        teacher,
        divergence=divergence,
        labels_R=labels_R,
        workspace=None if workspace_of is None else workspace_of(),
    ).loss_sum


def methods() -> Mapping[str, Method]:
    """By name. The compiled ones compile when they are first called."""
    compiled, compiled_with_products = torch.compile(formula), torch.compile(_with_products)
    return {
        "fused": fused,
        "fused, new workspace": partial(fused, workspace_of=Workspace),
        "compiled formula": lambda x: compiled(x.student_RD @ x.student_VD.T, x.teacher_RE @ x.teacher_VE.T),
        "compiled with products": lambda x: compiled_with_products(
            x.student_RD, x.student_VD, x.teacher_RE, x.teacher_VE
        ),
        "eager formula": lambda x: _with_products(x.student_RD, x.student_VD, x.teacher_RE, x.teacher_VE),
    }


# Bytes above the inputs for each logit of a model, measured once; to tell beforehand what does not fit.
BYTES_PER_LOGIT = {"compiled formula": 8, "compiled with products": 8, "eager formula": 28}


def exact_gradient(x: Inputs) -> Tensor:
    """[R, D] float64: of the summed forward KL by the student's hidden states."""
    leaf_RD = x.student_RD.detach().double().requires_grad_()
    log_q_RV = (leaf_RD @ x.student_VD.detach().double().T).log_softmax(-1)
    log_p_RV = (x.teacher_RE.double() @ x.teacher_VE.double().T).log_softmax(-1)
    (gradient_RD,) = torch.autograd.grad((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(), leaf_RD)
    return gradient_RD
