"""A target that is mixed from several teachers' distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest
from kdmesh.losses.gpu.form import KernelForm
from kdmesh.losses.gpu.rows import KernelRows
from kdmesh.losses.head import OutputHead
from kdmesh.losses.rows import DivergenceRows, Mix, StudentSide, become_logits

_TILE_ELEMENTS = 2**25  # of the scratch matrix that a GPU mixes with


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedTeacher:
    """One more teacher of a mixture."""

    hidden_RE: Tensor  # rows of the same positions, as wide as this teacher is; never carry a gradient
    head: OutputHead  # over the same tokens as the student's
    weight: float  # its part of the target


def first_weight(others: Sequence[MixedTeacher]) -> float:
    """What the weights of the others leave of 1 to the first teacher.

    Raises:
        InvalidRequest: one is negative, or they leave nothing.
    """
    weights = [teacher.weight for teacher in others]
    left = 1 - math.fsum(weights)
    if not (all(weight >= 0 for weight in weights) and left > 0):
        raise InvalidRequest(
            f"the teachers that are mixed in have the weights {weights}; each must be 0 or more, and their sum less "
            "than 1, which leaves the rest to the first teacher"
        )
    return left


class MixtureRows(DivergenceRows):
    """A divergence of the student from sum_i weight_i * softmax(logits_i / temperature)."""

    def __init__(
        self,
        student: StudentSide,
        teachers: Sequence[tuple[OutputHead, float]],
        mix: Mix,
        labels_R: Tensor | None,
        *,
        tile_CV: Tensor,
    ) -> None:
        """
        Args:
            teachers: heads and weights, in the order of the products; the weights are positive and sum to 1.
            tile_CV: as in DivergenceRows.
        """
        super().__init__(student, teachers[0][0], mix, labels_R, tile_CV=tile_CV)
        self._teachers = [(head, math.log(weight)) for head, weight in teachers]
        self._temperature = mix.temperature
        self._log_p_CV = torch.empty_like(tile_CV)

    def _teacher_logits(self, products: Sequence[Tensor]) -> Tensor:
        """temperature * log sum_i weight_i p_i, in the first one's memory: logits whose softmax is the mixture."""
        return _mixed_logits(self._teachers, products, self._temperature, self._log_p_CV)


class MixtureKernelRows(KernelRows):
    """As MixtureRows, where Triton runs: the mixture's logits are the teacher's for the kernel."""

    def __init__(
        self,
        student: StudentSide,
        teachers: Sequence[tuple[OutputHead, float]],
        form: KernelForm,
        mix: Mix,
        labels_R: Tensor | None,
    ) -> None:
        """`teachers` as in MixtureRows."""
        super().__init__(student, None, form, mix, labels_R)
        self._teachers = [(head, math.log(weight)) for head, weight in teachers]
        self._temperature = mix.temperature

    def _teacher_logits(self, products: Sequence[Tensor]) -> Tensor:
        mixed_CV = products[0]
        num_rows = max(1, _TILE_ELEMENTS // mixed_CV.shape[1])
        log_p_CV = mixed_CV.new_empty(min(num_rows, len(mixed_CV)), mixed_CV.shape[1])
        for tile_products in zip(*(torch.split(product_CV, num_rows) for product_CV in products), strict=True):
            _mixed_logits(self._teachers, tile_products, self._temperature, log_p_CV)
        return mixed_CV


def _mixed_logits(
    teachers: Sequence[tuple[OutputHead, float]], products: Sequence[Tensor], temperature: float, spare_CV: Tensor
) -> Tensor:
    """temperature * log sum_i weight_i p_i of heads and log-weights, in the first product's memory."""
    mixed_CV = products[0]
    log_p_CV = spare_CV[: len(mixed_CV)]
    for (head, log_weight), logits_CV in zip(teachers, products, strict=True):
        become_logits(logits_CV, head)
        if temperature != 1:
            logits_CV.mul_(1 / temperature)
        torch.log_softmax(logits_CV, -1, out=log_p_CV)
        if logits_CV is mixed_CV:
            torch.add(log_p_CV, log_weight, out=mixed_CV)
        else:
            torch.logaddexp(mixed_CV, log_p_CV.add_(log_weight), out=mixed_CV)
    return mixed_CV.mul_(temperature) if temperature != 1 else mixed_CV
