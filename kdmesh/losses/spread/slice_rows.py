"""The elementwise half of the fused loss over a part of the vocabulary: three passes, with an exchange after two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from kdmesh.losses.head import OutputHead
from kdmesh.losses.rows import Mix, StudentSide, become_logits
from kdmesh.losses.sampled import SampledDivergence
from kdmesh.losses.spread.slice_form import SliceForm
from kdmesh.losses.top1 import Runs


class SliceSums(NamedTuple):
    """Of every row what the softmax over all tokens needs of one slice; [B], or [W, B] of all slices.

    The largest logit of a slice without tokens is -inf.
    """

    student_max: Tensor
    student_sum: Tensor  # of exp((z - max) / temperature)
    untempered_sum: Tensor  # of exp(z - max), where it is needed and another
    label_logit: Tensor  # the student's, 0 where the label is in another slice
    teacher_max: Tensor
    teacher_sum: Tensor
    student_at_favourite: Tensor  # the student's logit at the teacher's likeliest token of the slice


class Compared(NamedTuple):
    """Of every row the slice's parts of what is added up over all tokens; [B], or [W, B] of all slices."""

    value: Tensor  # of the divergence
    h_sum: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeRows:
    """What is known of every row over all tokens after the first exchange; [B]."""

    student_max_B: Tensor
    student_log_sum_B: Tensor  # log q = (z - max) / temperature - this
    untempered_log_sum_B: Tensor  # the same at temperature 1
    teacher_max_B: Tensor
    teacher_log_sum_B: Tensor
    cross_entropy_B: Tensor
    agrees_B: Tensor  # 1 where both prefer the same token, else 0

    @classmethod
    def of(cls, slices: SliceSums, temperature: float) -> WholeRows:
        """From those of all ranks."""
        student_max_B, student_log_sum_B = _log_sum(slices.student_max, slices.student_sum, temperature)
        teacher_max_B, teacher_log_sum_B = _log_sum(slices.teacher_max, slices.teacher_sum, temperature)
        untempered_B = student_log_sum_B
        if temperature != 1:
            _, untempered_B = _log_sum(slices.student_max, slices.untempered_sum, 1.0)
        favourite_1B = slices.teacher_max.argmax(0, keepdim=True)
        agrees_B = slices.student_at_favourite.gather(0, favourite_1B)[0] == student_max_B
        return cls(
            student_max_B=student_max_B,
            student_log_sum_B=student_log_sum_B,
            untempered_log_sum_B=untempered_B,
            teacher_max_B=teacher_max_B,
            teacher_log_sum_B=teacher_log_sum_B,
            cross_entropy_B=untempered_B - (slices.label_logit.sum(0) - student_max_B),
            agrees_B=agrees_B.to(student_max_B.dtype),
        )

    def part(self, rows: slice) -> WholeRows:
        """Some of the rows."""
        return WholeRows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _log_sum(max_WB: Tensor, sum_WB: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[B] the largest of all, and the logarithm of the sum of exponentials relative to it."""
    max_B = max_WB.amax(0)
    return max_B, (((max_WB - max_B) / temperature).exp() * sum_WB).sum(0).log()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labels:
    """The next tokens of a chunk's rows, as one slice sees them."""

    token_C1: Tensor  # [C, 1] int64 within the slice; any where it is not in it
    is_here_C: Tensor  # [C] 1 where it is, else 0
    ce_weight_C: Tensor | None  # [C] of cross-entropy; None: it is not learnt from


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradient:
    """How h becomes the gradient, after the second exchange; [B]. Without a teacher there is no h."""

    factor_B: Tensor | None  # h of this slice times this is h of all tokens
    h_sum_B: Tensor | None  # of that, over all tokens

    def part(self, rows: slice) -> Gradient:
        """Some of the rows."""
        if self.factor_B is None or self.h_sum_B is None:
            return self
        return Gradient(factor_B=self.factor_B[rows], h_sum_B=self.h_sum_B[rows])


class SliceRows:
    """One thread's share of every block. Its rows are a slice of the chunk's, and come in tiles."""

    def __init__(
        self,
        student: StudentSide,
        teacher_head: OutputHead | None,
        mix: Mix,
        form: SliceForm | None,
        labels: Labels | None,
        *,
        scratch: Sequence[Tensor],
    ) -> None:
        """
        Args:
            teacher_head: None: cross-entropy alone; then `form` is None too.
            scratch: three matrices, with the most rows of a tile and the dtype to compute in.
        """
        self._student = student
        self._teacher_head = teacher_head
        self._mix = mix
        self._form = form
        self._labels = labels
        self._scratch = scratch
        num_tokens = scratch[0].shape[1]
        self._runs = Runs(num_tokens, scratch[0].device) if num_tokens else None

    def measure(self, rows: slice, products: Sequence[Tensor]) -> Tensor:
        """[7 + 3 k, B] `SliceSums`, then what is compared of the k likeliest tokens. Products become logits."""
        sums = torch.cat([self._sums(chunk, tiles) for chunk, tiles in self._tiles(rows, products)], dim=1)
        if self._mix.top_k == 0 or self._teacher_head is None:
            return sums
        student_BV, teacher_BV = products
        return torch.cat([sums, _likeliest(student_BV, teacher_BV, self._mix.top_k)])

    def compare(self, rows: slice, products: Sequence[Tensor], whole: WholeRows, *, keeps_h: bool) -> Tensor:
        """[4, B] `Compared`; h takes the place of the teacher's logits if it is to be kept."""
        parts = []
        for chunk, (logits_CV, teacher_CV) in self._tiles(rows, products):
            tile = slice(chunk.start - rows.start, chunk.stop - rows.start)
            log_q_CV, log_p_CV, spare_CV = (scratch_CV[: len(logits_CV)] for scratch_CV in self._scratch)
            self._log_probabilities(logits_CV, whole.student_max_B[tile], whole.student_log_sum_B[tile], out=log_q_CV)
            self._log_probabilities(teacher_CV, whole.teacher_max_B[tile], whole.teacher_log_sum_B[tile], out=log_p_CV)
            entropies = [log_q_CV.new_zeros(len(log_q_CV))] * 2
            if self._mix.with_entropies:
                both = (log_q_CV, log_p_CV)
                entropies = [-torch.linalg.vecdot(torch.exp(log_CV, out=spare_CV), log_CV) for log_CV in both]
            value_C, h_CV = self._divergence(chunk, log_q_CV, log_p_CV)
            parts.append(torch.stack([value_C, h_CV.sum(-1), *entropies]))
            if keeps_h:
                teacher_CV.copy_(h_CV)
        return torch.cat(parts, dim=1)

    def differentiate(
        self, rows: slice, products: Sequence[Tensor], whole: WholeRows, gradient: Gradient, out_BV: Tensor
    ) -> None:
        """Fill `out_BV` with d loss / d (student's product)."""
        for chunk, (logits_CV, *h) in self._tiles(rows, products):
            tile = slice(chunk.start - rows.start, chunk.stop - rows.start)
            dlogits_CV, q_CV, spare_CV = (scratch_CV[: len(logits_CV)] for scratch_CV in self._scratch)
            self._log_probabilities(logits_CV, whole.student_max_B[tile], whole.student_log_sum_B[tile], out=q_CV)
            q_CV.exp_()
            if gradient.factor_B is None or gradient.h_sum_B is None:
                dlogits_CV.zero_()
            else:  # kd_weight * (h - q sum(h)) / temperature
                weight = self._mix.kd_weight / self._mix.temperature
                torch.mul(h[0], (weight * gradient.factor_B[tile])[:, None], out=dlogits_CV)
                dlogits_CV.addcmul_(q_CV, (weight * gradient.h_sum_B[tile])[:, None], value=-1)
            self._mix_in_labels(chunk, tile, logits_CV, dlogits_CV, q_CV, whole)
            self._student.store_gradient(chunk, dlogits_CV, logits_CV, spare_CV=spare_CV, out_CV=out_BV[tile])

    def _tiles(self, rows: slice, products: Sequence[Tensor]) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Rows of the chunk, and their products."""
        most = len(self._scratch[0])
        starts = range(rows.start, rows.stop, most)
        tiles = zip(*(torch.split(product_BV, most) for product_BV in products), strict=True)
        for start, tile in zip(starts, tiles, strict=True):
            yield slice(start, min(start + most, rows.stop)), tile

    def _sums(self, chunk: slice, products: tuple[Tensor, ...]) -> Tensor:
        logits_CV, *teacher = products
        spare_CV, temperature = self._scratch[0][: len(logits_CV)], self._mix.temperature
        become_logits(logits_CV, self._student.head)
        none_C = logits_CV.new_zeros(len(logits_CV))
        max_C = _largest(logits_CV)
        sum_C = _sum_of_exponentials(logits_CV, max_C, temperature, spare_CV=spare_CV)
        untempered_C, label_logit_C = none_C, none_C
        if self._labels is not None:
            label_logit_C = self._at_label(chunk, logits_CV)
            if temperature != 1:
                untempered_C = _sum_of_exponentials(logits_CV, max_C, 1.0, spare_CV=spare_CV)
        found = [max_C, sum_C, untempered_C, label_logit_C]
        if self._teacher_head is None:
            return torch.stack([*found, none_C, none_C, none_C])
        (teacher_CV,) = teacher
        become_logits(teacher_CV, self._teacher_head)
        if self._runs is None:
            return torch.stack([*found, _largest(teacher_CV), none_C, _largest(teacher_CV)])
        maxima_CK = self._runs.maxima(teacher_CV)
        favourite_C1 = self._runs.favourite(teacher_CV, maxima_CK)
        teacher_max_C = maxima_CK.amax(-1)
        teacher_sum_C = _sum_of_exponentials(teacher_CV, teacher_max_C, temperature, spare_CV=spare_CV)
        return torch.stack([*found, teacher_max_C, teacher_sum_C, logits_CV.gather(-1, favourite_C1)[:, 0]])

    def _at_label(self, chunk: slice, logits_CV: Tensor) -> Tensor:
        """[C] the logit of the label, 0 where that is in another slice."""
        assert self._labels is not None
        if logits_CV.shape[1] == 0:
            return logits_CV.new_zeros(len(logits_CV))
        here_C = self._labels.is_here_C[chunk]
        return logits_CV.gather(-1, self._labels.token_C1[chunk])[:, 0].where(here_C > 0, 0)

    def _log_probabilities(self, logits_CV: Tensor, max_C: Tensor, log_sum_C: Tensor, *, out: Tensor) -> None:
        torch.sub(logits_CV, max_C[:, None], out=out)
        if self._mix.temperature != 1:
            out.mul_(1 / self._mix.temperature)
        out.sub_(log_sum_C[:, None])

    def _divergence(self, chunk: slice, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        assert self._form is not None
        compare = self._form.compare
        if not isinstance(compare, SampledDivergence):
            return compare(log_q_CV, log_p_CV)
        assert self._labels is not None
        if log_q_CV.shape[1] == 0:
            return log_q_CV.new_zeros(len(log_q_CV)), log_q_CV
        here_C = self._labels.is_here_C[chunk]
        value_C, h_CV = compare.function(log_q_CV, log_p_CV, self._labels.token_C1[chunk])
        return value_C * here_C, h_CV.mul_(here_C[:, None])

    def _mix_in_labels(
        self, chunk: slice, tile: slice, logits_CV: Tensor, dlogits_CV: Tensor, q_CV: Tensor, whole: WholeRows
    ) -> None:
        """Add ce_weight * (q - onehot), at temperature 1. Overwrites `q_CV`."""
        if self._labels is None or self._labels.ce_weight_C is None:
            return
        if self._mix.temperature != 1:
            torch.sub(logits_CV, whole.student_max_B[tile, None], out=q_CV)
            q_CV.sub_(whole.untempered_log_sum_B[tile, None]).exp_()
        weight_C1 = self._labels.ce_weight_C[chunk, None]
        dlogits_CV.addcmul_(q_CV, weight_C1)
        if dlogits_CV.shape[1]:
            here_C1 = self._labels.is_here_C[chunk, None]
            dlogits_CV.scatter_add_(-1, self._labels.token_C1[chunk], -weight_C1 * here_C1)


def topk_overlap(slices_W3kB: Tensor, k: int) -> Tensor:
    """[B] which part of the teacher's k likeliest tokens is among the student's, one that ties with the last included.

    Args:
        slices_W3kB: what `measure` adds for it, of all ranks.
        k: compared tokens, no more than there are.
    """
    student, teacher, student_there = (part_WkB.flatten(0, 1) for part_WkB in torch.tensor_split(slices_W3kB, 3, dim=1))
    favourites_kB = teacher.topk(k, dim=0).indices
    least_B = student.topk(k, dim=0).values[-1]
    return (student_there.gather(0, favourites_kB) >= least_B).to(least_B.dtype).mean(0)


def _likeliest(student_BV: Tensor, teacher_BV: Tensor, k: int) -> Tensor:
    """[3 k, B]: the student's k largest logits, the teacher's, and the student's at the teacher's; -inf where fewer."""
    num_found = min(k, student_BV.shape[1])
    teachers = teacher_BV.topk(num_found)
    found = (student_BV.topk(num_found).values, teachers.values, student_BV.gather(-1, teachers.indices))
    missing_BN = student_BV.new_full((len(student_BV), k - num_found), -torch.inf)
    return torch.cat([torch.cat([values_Bn, missing_BN], dim=1) for values_Bn in found], dim=1).T


def _largest(logits_CV: Tensor) -> Tensor:
    return logits_CV.amax(-1) if logits_CV.shape[1] else logits_CV.new_full((len(logits_CV),), -torch.inf)


def _sum_of_exponentials(logits_CV: Tensor, max_C: Tensor, temperature: float, *, spare_CV: Tensor) -> Tensor:
    """[C] of exp((z - max) / temperature)."""
    torch.sub(logits_CV, max_C[:, None], out=spare_CV)
    if temperature != 1:
        spare_CV.mul_(1 / temperature)
    return spare_CV.exp_().sum(-1)
