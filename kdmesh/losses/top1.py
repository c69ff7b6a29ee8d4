"""Compares the tokens that two models like best."""

from __future__ import annotations

import torch
from torch import Tensor

# amax is vectorised on a CPU, argmax is not and takes ten times as long: it sees runs and one run only.
_RUN = 128


class Runs:
    """A vocabulary cut into runs of tokens, whose maxima say which few of them are worth a closer look."""

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._width = min(_RUN, vocabulary_size)
        self._in_runs = vocabulary_size // self._width * self._width
        num_runs = -(-vocabulary_size // self._width)
        starts_K = torch.arange(num_runs, device=device) * self._width
        self._starts_K = starts_K.clamp_(max=vocabulary_size - self._width)  # the last may overlap the one before
        self._within_W = torch.arange(self._width, device=device)

    def maxima(self, logits_CV: Tensor) -> Tensor:
        """[C, K] the largest logit in each run, tokens of the run before left out."""
        maxima_CK = logits_CV[:, : self._in_runs].view(len(logits_CV), -1, self._width).amax(-1)
        if self._in_runs < logits_CV.shape[1]:
            last_C1 = logits_CV[:, self._in_runs :].amax(-1, keepdim=True)
            maxima_CK = torch.cat([maxima_CK, last_C1], dim=-1)
        return maxima_CK

    def tokens(self, runs_BN: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N * W] the tokens in some runs of each row, and whether each is in the run before as well."""
        tokens_BNW = self._starts_K[runs_BN].unsqueeze(-1) + self._within_W
        is_twice_BNW = tokens_BNW < (runs_BN * self._width).unsqueeze(-1)
        return tokens_BNW.flatten(1), is_twice_BNW.flatten(1)

    def favourite(self, logits_BV: Tensor, maxima_BK: Tensor) -> Tensor:
        """[B, 1] the token with the largest logit in each row, of several that tie any."""
        tokens_BW, _ = self.tokens(maxima_BK.argmax(-1, keepdim=True))
        return tokens_BW.gather(-1, logits_BV.gather(-1, tokens_BW).argmax(-1, keepdim=True))


class Top1Agreement:
    """Whether the teacher's favourite token is the student's too, or one of several that tie.

    A tile only notes maxima, which is cheap while it is in the cache: the student's, and the teacher's
    in each run of tokens.
    """

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self._runs = Runs(vocabulary_size, device)
        self._student_max: list[Tensor] = []
        self._teacher_run_max: list[Tensor] = []

    def note_student(self, student_CV: Tensor) -> None:
        """Note what is needed of a tile of the student's logits."""
        self._student_max.append(student_CV.amax(-1, keepdim=True))

    def note_teacher(self, teacher_CV: Tensor) -> None:
        """Note what is needed of a tile of the teacher's logits."""
        self._teacher_run_max.append(self._runs.maxima(teacher_CV))

    def end_block(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """[B] 1 or 0, for the tiles since the last call, whose logits these are."""
        best_B1 = self._runs.favourite(teacher_BV, torch.cat(self._teacher_run_max))
        agrees_B1 = student_BV.gather(-1, best_B1) == torch.cat(self._student_max)
        self._student_max.clear()
        self._teacher_run_max.clear()
        return agrees_B1[:, 0].to(student_BV.dtype)
