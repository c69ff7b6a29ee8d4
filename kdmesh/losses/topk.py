"""Compares the few tokens that two models like best."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.losses.top1 import Runs


class TopKOverlap:
    """Which part of the teacher's k favourite tokens is among the student's, one that ties with the last included.

    The k likeliest tokens lie in the k runs with the largest maxima, so that nothing sorts a vocabulary: a tile notes
    the maxima while it is in the cache, and at the end of a block k runs of each row are looked at.
    """

    def __init__(self, k: int, vocabulary_size: int, device: torch.device) -> None:
        """`k` is at least 1; of a smaller vocabulary all is compared."""
        self._k = min(k, vocabulary_size)
        self._runs = Runs(vocabulary_size, device)
        self._student_maxima: list[Tensor] = []
        self._teacher_maxima: list[Tensor] = []

    def note_student(self, student_CV: Tensor) -> None:
        """Note what is needed of a tile of the student's logits."""
        self._student_maxima.append(self._runs.maxima(student_CV))

    def note_teacher(self, teacher_CV: Tensor) -> None:
        """Note what is needed of a tile of the teacher's logits."""
        self._teacher_maxima.append(self._runs.maxima(teacher_CV))

    def end_block(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """[B] from 0 to 1, for the tiles since the last call, whose logits these are."""
        favourites_Bk, _ = self._favourites(teacher_BV, torch.cat(self._teacher_maxima))
        _, values_Bk = self._favourites(student_BV, torch.cat(self._student_maxima))
        self._student_maxima.clear()
        self._teacher_maxima.clear()
        is_among_Bk = student_BV.gather(-1, favourites_Bk) >= values_Bk[:, -1:]
        return is_among_Bk.to(student_BV.dtype).mean(-1)

    def _favourites(self, logits_BV: Tensor, maxima_BK: Tensor) -> tuple[Tensor, Tensor]:
        """[B, k] tokens, likeliest first, and their logits."""
        runs_Bk = maxima_BK.topk(min(self._k, maxima_BK.shape[1])).indices
        tokens_BN, is_twice_BN = self._runs.tokens(runs_Bk)
        best = logits_BV.gather(-1, tokens_BN).masked_fill_(is_twice_BN, -torch.inf).topk(self._k)
        return tokens_BN.gather(-1, best.indices), best.values
