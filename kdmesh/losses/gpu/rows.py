"""The elementwise half of the fused loss where Triton runs: a chunk of rows in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdmesh.losses.gpu.form import KernelForm
from kdmesh.losses.head import OutputHead
from kdmesh.losses.rows import Mix, RowValues, StudentSide, become_logits
from kdmesh.losses.topk import TopKOverlap

_BLOCK = 4096  # columns that a program holds at a time, 16 for each of its threads
_WARPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of the kernel, by the names of its parameters."""

    num_rows: int
    arguments: dict[str, Any]
    constants: dict[str, int | bool]
    num_warps: int = _WARPS


class KernelRows:
    """A `RowMaths` whose tiles are whole chunks, and whose gradients lie in place of the student's products."""

    def __init__(
        self,
        student: StudentSide,
        teacher_head: OutputHead | None,
        form: KernelForm,
        mix: Mix | None,
        labels_R: Tensor | None,
    ) -> None:
        """Without teacher and mix, cross-entropy alone."""
        self._student = student
        self._teacher_head = teacher_head
        self._form = form
        self._mix = mix
        self._labels_R = None if labels_R is None else labels_R.contiguous()
        self._values: list[Tensor] = []
        self._overlap: list[Tensor] = []

    def tile(self, rows: slice, products: Sequence[Tensor], gradient_CV: Tensor | None) -> None:
        """Products are the student's, then the teacher's."""
        student_CV, *teachers = products
        head = _without_bias(student_CV, self._student.head)
        teacher_CV = self._teacher_logits(teachers) if teachers else student_CV
        if self._mix is not None and self._mix.top_k:
            overlap = TopKOverlap(self._mix.top_k, head.vocabulary_size, student_CV.device)
            overlap.note_student(student_CV)
            overlap.note_teacher(teacher_CV)
            self._overlap.append(overlap.end_block(student_CV, teacher_CV))
        launch = self.launch(rows, student_CV, teacher_CV, gradient_CV)
        _run(launch)
        self._values.append(launch.arguments["values"])
        if gradient_CV is not None and self._student.bias_gradient_V is not None:
            self._student.bias_gradient_V.add_(gradient_CV.sum(0, dtype=torch.float32))

    def launch(self, rows: slice, student_CV: Tensor, teacher_CV: Tensor, gradient_CV: Tensor | None) -> Launch:
        """The launch for `rows` of the batch, whose soft caps and biases have been applied."""
        mix, head, num_rows = self._mix, self._student.head, len(student_CV)
        temperature = 1.0 if mix is None else mix.temperature
        cap, labels_R, weight_R = head.logit_softcap, self._labels_R, self._student.token_weight_R
        values_5C = student_CV.new_empty(5, num_rows)
        target_CV = student_CV if gradient_CV is None else gradient_CV
        arguments = {
            "student": student_CV,
            "teacher": teacher_CV,
            "gradient": target_CV,
            "labels": values_5C if labels_R is None else labels_R[rows],
            "weights": values_5C if weight_R is None else weight_R[rows],
            "values": values_5C,
            "num_columns": student_CV.shape[1],
            "student_stride": student_CV.stride(0),
            "teacher_stride": teacher_CV.stride(0),
            "gradient_stride": target_CV.stride(0),
            "student_factor": _factor(head) / temperature,
            "teacher_factor": (1.0 if self._teacher_head is None else self._teacher_factor()) / temperature,
            "temperature": temperature,
            "kd_factor": 0.0 if mix is None else mix.kd_weight / temperature,
            "ce_weight": 1.0 if mix is None else mix.ce_weight,
            "scale": head.logit_scale,
            "inverse_cap": 0.0 if cap is None else 1 / cap,
            "first": self._form.first,
            "second": self._form.second,
        }
        constants = {
            "OP": int(self._form.op),
            "HAS_LABELS": labels_R is not None,
            "HAS_WEIGHTS": weight_R is not None,
            "HAS_CAP": cap is not None,
            "IS_TEMPERED": temperature != 1,
            "WITH_ENTROPIES": mix is not None and mix.with_entropies,
            "WITH_GRADIENT": gradient_CV is not None,
            "BLOCK": min(_BLOCK, max(16, 1 << (student_CV.shape[1] - 1).bit_length())),
        }
        return Launch(num_rows=num_rows, arguments=arguments, constants=constants)

    def end_block(self, products: Sequence[Tensor]) -> RowValues:
        """What the mix asks for."""
        values_5R = torch.cat(self._values, dim=1)
        self._values.clear()
        divergence_R, cross_entropy_R, agreement_R, student_R, teacher_R = values_5R
        absent_0, mix = divergence_R[:0], self._mix
        if self._labels_R is None:
            cross_entropy_R = absent_0
        overlap_R = torch.cat([absent_0, *self._overlap])
        self._overlap.clear()
        if mix is None:
            loss_R, divergence_R, agreement_R = cross_entropy_R, absent_0, absent_0
        else:
            loss_R = divergence_R * mix.kd_weight
            if self._labels_R is not None:
                loss_R = loss_R + cross_entropy_R * mix.ce_weight
        with_entropies = mix is not None and mix.with_entropies
        return RowValues(
            loss_R=loss_R,
            divergence_R=divergence_R,
            cross_entropy_R=cross_entropy_R,
            top1_agreement_R=agreement_R,
            student_entropy_R=student_R if with_entropies else absent_0,
            teacher_entropy_R=teacher_R if with_entropies else absent_0,
            topk_overlap_R=overlap_R,
        )

    def _teacher_logits(self, products: Sequence[Tensor]) -> Tensor:
        """What the teacher's products become, in the memory of the first, but for `_teacher_factor`."""
        assert self._teacher_head is not None
        (product_CV,) = products
        _without_bias(product_CV, self._teacher_head)
        return product_CV

    def _teacher_factor(self) -> float:
        assert self._teacher_head is not None
        return _factor(self._teacher_head)


def _without_bias(product_CV: Tensor, head: OutputHead) -> OutputHead:
    """Add the head's bias and apply its soft cap, where it has them; to scale is left to the kernel."""
    if head.logit_softcap is not None:
        become_logits(product_CV, head)
    elif head.bias_V is not None:
        product_CV.add_(head.bias_V)
    return head


def _factor(head: OutputHead) -> float:
    """From what the kernel reads to logits: a soft cap has been applied with the scale within it."""
    return 1.0 if head.logit_softcap is not None else head.logit_scale


def _run(launch: Launch) -> None:
    from kdmesh.losses.gpu.row_kernel import row_kernel  # Triton, which a CPU has no use for

    with torch.cuda.device_of(launch.arguments["student"]):  # type: ignore[no-untyped-call]
        row_kernel[(launch.num_rows,)](**launch.arguments, **launch.constants, num_warps=launch.num_warps)
