"""The loop of the fused loss over chunks of the rows of all ranks, for one rank's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kdmesh.losses.engine import Gradients, Side, Sizes
from kdmesh.losses.head import OutputHead
from kdmesh.losses.matmul import hidden_gradient_into, logits_into, spans, weight_gradient_into
from kdmesh.losses.rows import Mix, RowValues, StudentSide
from kdmesh.losses.spread.slice_form import SliceForm
from kdmesh.losses.spread.slice_rows import Compared, Gradient, Labels, SliceRows, SliceSums, WholeRows, topk_overlap
from kdmesh.losses.spread.vocabulary_share import VocabularyShare
from kdmesh.losses.threads import run_each
from kdmesh.losses.workspace import Workspace

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnRows:
    """What a rank brings, all about the same R positions; with R = 0 it only takes part."""

    student_hidden_RD: Tensor  # carries a gradient
    teacher_hidden_RE: Tensor | None  # of the same type and width on every rank; None: cross-entropy alone
    labels_R: Tensor | None  # int64 next tokens; None on all ranks or on none
    ce_weight_R: Tensor | None = None  # replaces the mix's on each row; None on all ranks or on none
    token_weight_R: Tensor | None = None  # 1 when None; None on all ranks or on none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SliceCall:
    """One call, but for the tensors that autograd follows."""

    rows: OwnRows
    student_head: OutputHead
    teacher_head: OutputHead | None
    mix: Mix
    form: SliceForm | None
    share: VocabularyShare
    counts: Sequence[int]
    chunk_tokens: int | None
    workspace: Workspace


class SliceSweep:
    """The loop over chunks. A block's logits over this rank's tokens exist at once, and a chunk's logit gradient."""

    def __init__(self, call: SliceCall, head: OutputHead, wanted: tuple[bool, ...]) -> None:
        rows, share = call.rows, call.share
        is_double = torch.float64 in (rows.student_hidden_RD.dtype, head.weight_VD.dtype)
        self._call = call
        self._share = share
        self._student = Side.build(rows.student_hidden_RD, head, is_double=is_double)
        self._sides = [self._student]
        if call.teacher_head is not None:
            assert rows.teacher_hidden_RE is not None
            self._sides += [Side.build(rows.teacher_hidden_RE.detach(), call.teacher_head, is_double=is_double)]
        self._device = rows.student_hidden_RD.device
        self._dtype = self._student.product_dtype
        # By the longest share, so that ranks meet as often as each other.
        self._sizes = Sizes.choose(max(1, sum(call.counts)), max(1, share.longest), self._device, call.chunk_tokens)
        wants_hidden, *others = wanted
        self._gradients = Gradients.allocate(self._student, (False, *others), num_threads=self._sizes.num_threads)
        # Added up over ranks in this type; rounded after that.
        self._hidden_gradient_RD = torch.zeros_like(rows.student_hidden_RD, dtype=self._dtype) if wants_hidden else None
        self._has_gradient = any(wanted)
        tile = self._sizes.tile_rows, len(head.weight_VD)
        self._scratch = [
            [torch.empty(tile, dtype=self._dtype, device=self._device) for _ in range(3)]
            for _ in range(self._sizes.num_threads)
        ]

    def run(self) -> tuple[RowValues, Gradients]:
        """Values of this rank's rows, and the gradients; that of the hidden states in the type of the products."""
        values: list[RowValues] = []
        for own, taken in self._share.rounds(self._call.counts, self._sizes.chunk_rows):
            before = sum(taken[: self._share.rank])
            of_all = self._chunk(own, taken, adds=len(values) > 0)
            values.append(of_all.part(slice(before, before + taken[self._share.rank])))
        joined = RowValues.joined(values, like=torch.empty(0, dtype=self._dtype, device=self._device))
        loss_R = torch.zeros(len(self._student.hidden_RD), dtype=self._dtype, device=self._device)
        if self._call.form is not None:
            loss_R += joined.divergence_R * self._call.mix.kd_weight
        if self._call.rows.labels_R is not None:
            own_weight_R = self._call.rows.ce_weight_R
            loss_R += joined.cross_entropy_R * (self._call.mix.ce_weight if own_weight_R is None else own_weight_R)
        return replace(joined, loss_R=loss_R), replace(self._gradients, hidden_RD=self._hidden_gradient_RD)

    def _chunk(self, own: slice, taken: Sequence[int], *, adds: bool) -> RowValues:
        num_rows = sum(taken)
        hidden = [self._share.gather(side.hidden_RD[own], taken) for side in self._sides]
        maths = self._maths(own, taken)
        gradient_CV = None
        if self._has_gradient:
            gradient_CV = self._call.workspace.matrix(
                "logit gradient",
                num_rows,
                self._student.head.vocabulary_size,
                dtype=self._student.hidden_RD.dtype,
                device=self._device,
            )
        values = []
        for block in spans(num_rows, self._sizes.block_rows, multiple=self._sizes.multiple):
            products = [
                self._product(n, side, hidden_CD[block])
                for n, (side, hidden_CD) in enumerate(zip(self._sides, hidden, strict=True))
            ]
            values.append(self._block(block, products, maths, None if gradient_CV is None else gradient_CV[block]))
        if gradient_CV is not None:
            self._chain_rule(own, taken, gradient_CV, hidden[0], adds=adds)
        return RowValues.joined(values, like=torch.empty(0, dtype=self._dtype, device=self._device))

    def _product(self, n: int, side: Side, hidden_BD: Tensor) -> Tensor:
        workspace, size = self._call.workspace, side.head.vocabulary_size
        whole_BV = workspace.matrix(
            f"product {n}", self._sizes.block_rows, size, dtype=side.product_dtype, device=self._device
        )
        product_BV = whole_BV[: len(hidden_BD)]
        if size:
            logits_into(product_BV, hidden_BD, side.head.weight_VD, workspace)
        return product_BV

    def _maths(self, own: slice, taken: Sequence[int]) -> list[SliceRows]:
        """For each thread, with what is known of the chunk's rows."""
        call, rows = self._call, self._call.rows
        token_weight_C = None
        if rows.token_weight_R is not None:
            token_weight_C = self._share.gather(rows.token_weight_R[own].to(self._dtype), taken)
        labels = self._labels(own, taken)
        return [
            SliceRows(
                StudentSide(
                    head=self._student.head,
                    token_weight_R=token_weight_C,
                    bias_gradient_V=None if self._gradients.bias_NV is None else self._gradients.bias_NV[n],
                ),
                call.teacher_head,
                call.mix,
                call.form,
                labels,
                scratch=scratch,
            )
            for n, scratch in enumerate(self._scratch)
        ]

    def _labels(self, own: slice, taken: Sequence[int]) -> Labels | None:
        rows, mix = self._call.rows, self._call.mix
        if rows.labels_R is None:
            return None
        token_C = self._share.gather(rows.labels_R[own], taken) - self._share.first
        last = self._share.num_tokens - 1
        is_here_C = (token_C >= 0) & (token_C <= last)
        ce_weight_C = None
        if rows.ce_weight_R is not None:
            ce_weight_C = self._share.gather(rows.ce_weight_R[own].to(self._dtype), taken)
        elif mix.ce_weight != 0:
            ce_weight_C = torch.full((len(token_C),), mix.ce_weight, dtype=self._dtype, device=self._device)
        return Labels(
            token_C1=token_C.clamp(0, max(0, last))[:, None],
            is_here_C=is_here_C.to(self._dtype),
            ce_weight_C=ce_weight_C,
        )

    def _block(
        self, rows: slice, products: Sequence[Tensor], maths: Sequence[SliceRows], gradient_BV: Tensor | None
    ) -> RowValues:
        """Values of a block's rows, of whichever rank they are, and the gradient of the student's products."""
        mix, threads = self._call.mix, _Threads(rows, products, maths)
        measured_WKB = self._share.beside_each_other(
            torch.cat(threads.run(lambda own, chunk, parts, _: own.measure(chunk, parts)), dim=1)
        )
        sums_WKB, overlap_W3kB = measured_WKB[:, : len(SliceSums._fields)], measured_WKB[:, len(SliceSums._fields) :]
        whole = WholeRows.of(SliceSums(*sums_WKB.unbind(1)), mix.temperature)
        compared, gradient = None, Gradient(factor_B=None, h_sum_B=None)
        if self._call.form is not None:
            keeps_h = gradient_BV is not None
            parts = threads.run(
                lambda own, chunk, parts, block: own.compare(chunk, parts, whole.part(block), keeps_h=keeps_h)
            )
            compared_WKB = self._share.beside_each_other(torch.cat(parts, dim=1))
            compared, gradient = self._combined(Compared(*compared_WKB.unbind(1)), whole)
        if gradient_BV is not None:
            threads.run(
                lambda own, chunk, parts, block: own.differentiate(
                    chunk, parts, whole.part(block), gradient.part(block), gradient_BV[block]
                )
            )
        overlap_B = None
        if compared is not None and mix.top_k:
            overlap_B = topk_overlap(overlap_W3kB, mix.top_k)
        return self._values(whole, compared, overlap_B)

    def _combined(self, slices: Compared, whole: WholeRows) -> tuple[Compared, Gradient]:
        assert self._call.form is not None
        value_B, factor_WB = self._call.form.combine(slices.value, whole.agrees_B)
        h_sum_B = (factor_WB * slices.h_sum).sum(0)
        compared = Compared(
            value=value_B,
            h_sum=h_sum_B,
            student_entropy=slices.student_entropy.sum(0),
            teacher_entropy=slices.teacher_entropy.sum(0),
        )
        return compared, Gradient(factor_B=factor_WB[self._share.rank], h_sum_B=h_sum_B)

    def _values(self, whole: WholeRows, compared: Compared | None, overlap_B: Tensor | None) -> RowValues:
        mix, absent_0 = self._call.mix, whole.student_max_B[:0]
        has_labels = self._call.rows.labels_R is not None
        return RowValues(
            loss_R=absent_0,  # follows from the others
            divergence_R=absent_0 if compared is None else compared.value,
            cross_entropy_R=whole.cross_entropy_B if has_labels else absent_0,
            top1_agreement_R=absent_0 if compared is None else whole.agrees_B,
            student_entropy_R=compared.student_entropy if compared is not None and mix.with_entropies else absent_0,
            teacher_entropy_R=compared.teacher_entropy if compared is not None and mix.with_entropies else absent_0,
            topk_overlap_R=absent_0 if overlap_B is None else overlap_B,
        )

    def _chain_rule(
        self, own: slice, taken: Sequence[int], gradient_CV: Tensor, hidden_CD: Tensor, *, adds: bool
    ) -> None:
        """From the gradient of a chunk's products to that of its rows, over all ranks, and of this rank's weight."""
        weight_VD = self._student.head.weight_VD
        if self._hidden_gradient_RD is not None:
            part_CD = torch.zeros_like(hidden_CD, dtype=self._dtype)
            if len(weight_VD):
                hidden_gradient_into(part_CD, gradient_CV, weight_VD)
            self._hidden_gradient_RD[own] = self._share.add_up(part_CD, taken)
        if self._gradients.weight_VD is not None and len(weight_VD):
            weight_gradient_into(self._gradients.weight_VD, gradient_CV, hidden_CD, adds=adds)


class _Threads:
    """The threads' shares of one block."""

    def __init__(self, rows: slice, products: Sequence[Tensor], maths: Sequence[SliceRows]) -> None:
        num_rows = rows.stop - rows.start
        self._shares = spans(num_rows, -(-num_rows // len(maths)))
        self._rows = rows
        self._products = products
        self._maths = maths

    def run(self, work: Callable[[SliceRows, slice, list[Tensor], slice], T]) -> list[T]:
        """What `work` makes of each share, in order.

        Args:
            work: called with the thread's maths, rows of the chunk, their products, and rows of the block.
        """
        start = self._rows.start
        return run_each(
            [
                partial(
                    work,
                    maths,
                    slice(start + share.start, start + share.stop),
                    [product_BV[share] for product_BV in self._products],
                    share,
                )
                for share, maths in zip(self._shares, self._maths[: len(self._shares)], strict=True)
            ]
        )
