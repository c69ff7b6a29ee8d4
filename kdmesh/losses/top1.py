"""Compares the tokens that two models like best."""

from __future__ import annotations

import torch
from torch import Tensor

# amax is vectorised on a CPU, argmax is not and takes ten times as long: it sees runs and one run only.
_RUN = 128


class Top1Agreement:
    """Whether the teacher's favourite token is the student's too, or one of several that tie.

    A tile only notes maxima, which is cheap while it is in the cache: the student's, and the teacher's
    in each run of tokens.
    """

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._width = min(_RUN, vocabulary_size)
        self._in_runs = vocabulary_size // self._width * self._width
        num_runs = -(-vocabulary_size // self._width)
        starts_K = torch.arange(num_runs, device=device) * self._width
        self._starts_K = starts_K.clamp_(max=vocabulary_size - self._width)  # the last may overlap the one before
        self._within_W = torch.arange(self._width, device=device)
        self._student_max: list[Tensor] = []
        self._teacher_run_max: list[Tensor] = []

    def note_student(self, student_CV: Tensor) -> None:
        """Note what is needed of a tile of the student's logits."""
        self._student_max.append(student_CV.amax(-1, keepdim=True))

    def note_teacher(self, teacher_CV: Tensor) -> None:
        """Note what is needed of a tile of the teacher's logits."""
        run_max_CK = teacher_CV[:, : self._in_runs].view(len(teacher_CV), -1, self._width).amax(-1)
        if self._in_runs < teacher_CV.shape[1]:
            last_C1 = teacher_CV[:, -self._width :].amax(-1, keepdim=True)
            run_max_CK = torch.cat([run_max_CK, last_C1], dim=-1)
        self._teacher_run_max.append(run_max_CK)

    def end_block(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """[B] 1 or 0, for the tiles since the last call, whose logits these are."""
        run_B1 = torch.cat(self._teacher_run_max).argmax(-1, keepdim=True)
        tokens_BW = self._starts_K[run_B1] + self._within_W
        best_B1 = tokens_BW.gather(-1, teacher_BV.gather(-1, tokens_BW).argmax(-1, keepdim=True))
        agrees_B1 = student_BV.gather(-1, best_B1) == torch.cat(self._student_max)
        self._student_max.clear()
        self._teacher_run_max.clear()
        return agrees_B1[:, 0].to(student_BV.dtype)
