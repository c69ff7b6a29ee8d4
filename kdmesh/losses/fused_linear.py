"""Output head and loss in one differentiable step that never builds a [R, V] matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdmesh.errors import InvalidRequest
from kdmesh.losses.divergences import Divergence
from kdmesh.losses.engine import Gradients, Side, Sizes, sweep
from kdmesh.losses.gpu.form import KernelForm, Op, kernel_form, kernel_runs_on
from kdmesh.losses.gpu.rows import KernelRows
from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import scaled
from kdmesh.losses.mixture import MixedTeacher, MixtureKernelRows, MixtureRows, first_weight
from kdmesh.losses.rows import CrossEntropyRows, DivergenceRows, Mix, RowMaths, RowValues, StudentSide
from kdmesh.losses.sampled import SampledDivergence
from kdmesh.losses.workspace import Workspace, default_workspace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedLoss:
    """A summed loss, and what each row came to.

    The per-row tensors carry no gradient, no weight and no kd_weight or ce_weight. One that the call
    had no means to know (no teacher, no labels) is empty, [0]: it adds nothing to a sum.
    """

    loss_sum: Tensor  # [] float32, differentiable: sum of weight * (kd_weight * D + ce_weight * CE)
    divergence_R: Tensor  # [R] float32, nats; [0] without a teacher
    cross_entropy_R: Tensor  # [R] float32, nats, at temperature 1; [0] without labels
    top1_agreement_R: Tensor  # [R] float32, 1 where both prefer the same token, else 0; [0] without a teacher
    student_entropy_R: Tensor  # [R] float32, nats, at the divergence's temperature; [0] unless asked for
    teacher_entropy_R: Tensor  # [R] float32, likewise
    topk_overlap_R: Tensor  # [R] float32, part of the teacher's k likeliest in the student's; [0] unless asked for

    @classmethod
    def of(cls, loss_sum: Tensor, per_row: Sequence[Tensor]) -> FusedLoss:
        """From RowValues.told()."""
        names = [field.name for field in fields(cls) if field.name != "loss_sum"]
        return cls(loss_sum=loss_sum, **dict(zip(names, per_row, strict=True)))


def fused_linear_divergence(
    student_hidden_RD: Tensor,
    student_head: OutputHead,
    teacher_hidden_RE: Tensor,
    teacher_head: OutputHead,
    *,
    divergence: Divergence | SampledDivergence,
    mixed_with: Sequence[MixedTeacher] = (),
    temperature: float = 1.0,
    labels_R: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight_R: Tensor | None = None,
    with_entropies: bool = False,
    top_k: int = 0,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> FusedLoss:
    """Sum over rows of weight * (kd_weight * D(student, teacher) + ce_weight * CE(student, label)).

    The gradient is computed here, not in the backward pass, and only for those of hidden states,
    weight and bias that require one; none under torch.no_grad(). Logits are float32 also for
    bfloat16 models. R may be 0: the loss is 0 and its gradients are zeros.

    Args:
        student_hidden_RD: after the final norm; carries a gradient.
        student_head: its tensors carry one too. A plain tensor, not a shard.
        teacher_hidden_RE: rows of the same positions; never carry one.
        teacher_head: over the same tokens as the student's: cut padding off first (OutputHead.sliced).
        mixed_with: further teachers: D is from the weighted sum of all distributions, each at the temperature. The
            first teacher's weight is what theirs leave of 1; one of weight 0 is not looked at.
        temperature: divides both logits before the divergence; the result is not multiplied by its square.
        labels_R: int64 next tokens; cross-entropy is reported when they are given. A SampledDivergence needs them, and
            takes them for tokens that the student drew at this temperature.
        token_weight_R: of each row; 1 when None.
        with_entropies: whether to report those of student and teacher, which takes a little more time.
        top_k: how many of the likeliest tokens to compare, which takes some more; 0 compares none.
        chunk_tokens: rows whose logit gradient exists at once; None chooses by device and vocabulary.
        workspace: scratch, which the next call may use again. None: on a CPU what this thread keeps from call to
            call, as large as its largest call needed; on a GPU, whose allocator keeps memory by itself, a new one.

    Raises:
        InvalidRequest: shapes disagree, a number is out of range, or ce_weight or a sampled
            divergence lacks labels.
    """
    weight, others = first_weight(mixed_with), [teacher for teacher in mixed_with if teacher.weight > 0]
    teachers = [(teacher_hidden_RE, teacher_head), *((teacher.hidden_RE, teacher.head) for teacher in others)]
    if ce_weight != 0 and labels_R is None:
        raise InvalidRequest(f"ce_weight is {ce_weight} without labels; cross-entropy needs them")
    if isinstance(divergence, SampledDivergence) and labels_R is None:
        raise InvalidRequest("a sampled divergence needs the drawn tokens as labels")
    if not temperature > 0:
        raise InvalidRequest(f"temperature is {temperature}; it must be positive")
    for hidden_RE, head in teachers:
        _check_vocabulary(student_head, head)
        _check_side("teacher", hidden_RE, head)
        _check_rows(len(student_hidden_RD), teacher_hidden_RE=hidden_RE)
    _check_rows(len(student_hidden_RD), labels_R=labels_R)
    mix = Mix(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        with_entropies=with_entropies,
        top_k=top_k,
    )

    def build_maths(student: StudentSide, tile_CV: Tensor) -> RowMaths:
        if not others:
            return DivergenceRows(student, teacher_head, mix, labels_R, tile_CV=tile_CV)
        weighted = [(teacher_head, weight), *((teacher.head, teacher.weight) for teacher in others)]
        return MixtureRows(student, weighted, mix, labels_R, tile_CV=tile_CV)

    form = kernel_form(divergence)

    def build_kernel_rows(student: StudentSide) -> RowMaths:
        assert form is not None
        if not others:
            return KernelRows(student, teacher_head, form, mix, labels_R)
        weighted = [(teacher_head, weight), *((teacher.head, teacher.weight) for teacher in others)]
        return MixtureKernelRows(student, weighted, form, mix, labels_R)

    return run_fused(
        FusedCall(
            student_head=student_head,
            teachers=[(hidden_RE.detach(), head.detached()) for hidden_RE, head in teachers],
            build_maths=build_maths,
            build_kernel_rows=None if form is None else build_kernel_rows,
            token_weight_R=token_weight_R,
            chunk_tokens=chunk_tokens,
            workspace=workspace or default_workspace(student_hidden_RD.device),
        ),
        student_hidden_RD,
    )


def fused_linear_cross_entropy(
    student_hidden_RD: Tensor,
    student_head: OutputHead,
    labels_R: Tensor,
    *,
    token_weight_R: Tensor | None = None,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> FusedLoss:
    """Sum over rows of weight * CE(student, label), in the manner of fused_linear_divergence.

    Raises:
        InvalidRequest: shapes disagree.
    """
    _check_rows(len(student_hidden_RD), labels_R=labels_R)

    def build_maths(student: StudentSide, tile_CV: Tensor) -> RowMaths:
        return CrossEntropyRows(student, labels_R, tile_CV=tile_CV)

    def build_kernel_rows(student: StudentSide) -> RowMaths:
        return KernelRows(student, None, KernelForm(op=Op.NOTHING), None, labels_R)

    return run_fused(
        FusedCall(
            student_head=student_head,
            teachers=[],
            build_maths=build_maths,
            build_kernel_rows=build_kernel_rows,
            token_weight_R=token_weight_R,
            chunk_tokens=chunk_tokens,
            workspace=workspace or default_workspace(student_hidden_RD.device),
        ),
        student_hidden_RD,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedCall:
    """One call, but for the tensors that autograd follows."""

    student_head: OutputHead
    teachers: Sequence[tuple[Tensor, OutputHead]]
    build_maths: Callable[[StudentSide, Tensor], RowMaths]
    build_kernel_rows: Callable[[StudentSide], RowMaths] | None = None  # None where the kernel has no such loss
    token_weight_R: Tensor | None
    chunk_tokens: int | None
    workspace: Workspace


class _FusedLinear(torch.autograd.Function):
    """Computes every gradient that is wanted in forward; backward multiplies it by a number."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: FusedCall, wanted: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        """The loss sum and the per-row tensors."""
        head = replace(call.student_head, weight_VD=weight_VD, bias_V=bias_V)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            values, gradients = _run(call, hidden_RD, head, wanted)
            loss_R = values.loss_R if call.token_weight_R is None else values.loss_R * call.token_weight_R
            loss_sum = loss_R.sum()
        bias_gradient_V = None if gradients.bias_NV is None else gradients.bias_NV.sum(0)
        ctx.save_for_backward(gradients.hidden_RD, gradients.weight_VD, bias_gradient_V)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype, weight_VD.dtype if bias_V is None else bias_V.dtype
        per_row = values.told()
        ctx.mark_non_differentiable(*per_row)
        return loss_sum, *per_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times `loss_gradient`, in the dtypes of what they are gradients of."""
        gradients = (
            None if gradient is None else scaled(gradient, loss_gradient, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def run_fused(call: FusedCall, hidden_RD: Tensor) -> FusedLoss:
    """Values and gradients of one call.

    Raises:
        InvalidRequest: shapes disagree.
    """
    head = call.student_head
    _check_side("student", hidden_RD, head)
    _check_rows(len(hidden_RD), token_weight_R=call.token_weight_R)
    if call.chunk_tokens is not None and call.chunk_tokens < 1:
        raise InvalidRequest(f"chunk_tokens is {call.chunk_tokens}; it must be at least 1")
    inputs = hidden_RD, head.weight_VD, head.bias_V
    wanted = tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs)
    loss_sum, *per_row = _FusedLinear.apply(*inputs, call, wanted)  # type: ignore[no-untyped-call]
    return FusedLoss.of(loss_sum, per_row)


def _run(call: FusedCall, hidden_RD: Tensor, head: OutputHead, wanted: tuple[bool, ...]) -> tuple[RowValues, Gradients]:
    everything = [(hidden_RD, head), *call.teachers]
    is_double = any(torch.float64 in (rows.dtype, head.weight_VD.dtype) for rows, head in everything)
    student, *others = [Side.build(rows, head, is_double=is_double) for rows, head in everything]
    device, widest = hidden_RD.device, max(side.head.vocabulary_size for side in (student, *others))
    # A scale of another sign would turn the order of the products around, which the kernel's overlap relies on.
    has_order = all(head.logit_scale > 0 for _, head in everything)
    with_kernel = call.build_kernel_rows is not None and has_order and not is_double and kernel_runs_on(device)
    sizes = Sizes.choose(len(hidden_RD), widest, device, call.chunk_tokens, with_kernel=with_kernel)
    gradients = Gradients.allocate(student, wanted, num_threads=sizes.num_threads)
    like = hidden_RD.new_empty(0, dtype=student.product_dtype)
    token_weight_R = None if call.token_weight_R is None else call.token_weight_R.to(like.dtype).contiguous()
    sides = [
        StudentSide(
            head=head,
            token_weight_R=token_weight_R,
            bias_gradient_V=None if gradients.bias_NV is None else gradients.bias_NV[n],
        )
        for n in range(sizes.num_threads)
    ]
    if with_kernel:
        assert call.build_kernel_rows is not None
        maths = [call.build_kernel_rows(side) for side in sides]
    else:
        maths = [call.build_maths(side, like.new_empty(sizes.tile_rows, head.vocabulary_size)) for side in sides]
    values = sweep([student, *others], maths, gradients, sizes, call.workspace)
    return RowValues.joined(values, like=like), gradients


def _check_vocabulary(student_head: OutputHead, teacher_head: OutputHead) -> None:
    if student_head.vocabulary_size != teacher_head.vocabulary_size:
        raise InvalidRequest(
            f"the student's head has {student_head.vocabulary_size} tokens, the teacher's "
            f"{teacher_head.vocabulary_size}; cut both to the tokens they share (OutputHead.sliced)"
        )


def _check_side(name: str, hidden_RD: Tensor, head: OutputHead) -> None:
    if hidden_RD.ndim != 2 or hidden_RD.shape[1] != head.hidden_size:
        raise InvalidRequest(
            f"the {name}'s hidden states have shape {tuple(hidden_RD.shape)}; its head needs [R, {head.hidden_size}]"
        )


def _check_rows(num_rows: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and len(tensor) != num_rows:
            raise InvalidRequest(f"{name} has {len(tensor)} rows, the student's hidden states have {num_rows}")
