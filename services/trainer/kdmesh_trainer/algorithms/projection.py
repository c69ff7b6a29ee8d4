"""The linear map between two models' hidden states that keeps their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kdmesh.alignment.vocabularies import SharedTokens
from kdmesh.losses import OutputHead

_BLOCK_TOKENS = 8192


def logit_preserving_map(source: OutputHead, target: OutputHead, device: torch.device) -> Tensor:
    """[E, D] float64 on `device`: M with which `target` makes of M h the logits nearest to those of `source` from h.

    That is pinv(W_target) W_source, through products of the heads' columns, so that no matrix as long as the vocabulary
    is made. Biases and soft caps are left out.

    Args:
        source: [V, D], over the same tokens as `target`.
        target: [V, E].
    """
    inverse_EE = _inverse(target.weight_VD, device)
    cross_ED = _cross(target.weight_VD, source.weight_VD, device, torch.float64)
    return inverse_EE @ cross_ED * (source.logit_scale / target.logit_scale)


class FollowingMap:
    """The map from the student into its teacher's space, of their heads as they are when it is asked for.

    What depends on the teacher's head alone is computed when that changes; the rest takes as long as the product of E
    rows with the student's head.
    """

    def __init__(self, shared: SharedTokens | None, device: torch.device) -> None:
        """`shared` are the tokens to go by; None: all, which are the same."""
        self._device = device
        self._student_S = None if shared is None else torch.from_numpy(shared.student_ids).long().to(device)
        self._teacher_S = None if shared is None else torch.from_numpy(shared.teacher_ids).long().to(device)
        self._weight_VE: Tensor | None = None  # the teacher's that the next two are of
        self._known_SE: Tensor
        self._inverse_EE: Tensor

    @torch.no_grad()
    def between(self, student: OutputHead, teacher: OutputHead) -> Tensor:
        """[E, D] float32 (float64 where the student's head is), without a gradient."""
        dtype = torch.promote_types(student.weight_VD.dtype, torch.float32)
        if self._weight_VE is not teacher.weight_VD:
            self._weight_VE = teacher.weight_VD
            self._known_SE = teacher.weight_VD if self._teacher_S is None else teacher.weight_VD[self._teacher_S]
            self._inverse_EE = _inverse(self._known_SE, self._device)
        own_SD = student.weight_VD if self._student_S is None else student.weight_VD[self._student_S]
        cross_ED = _cross(self._known_SE, own_SD, self._device, dtype)
        return self._inverse_EE.to(dtype) @ cross_ED * (student.logit_scale / teacher.logit_scale)


def _inverse(weight_VE: Tensor, device: torch.device) -> Tensor:
    """[E, E] float64: the pseudo-inverse of W^T W."""
    inverse_EE: Tensor = torch.linalg.pinv(_cross(weight_VE, weight_VE, device, torch.float64), hermitian=True)
    return inverse_EE


def _cross(left_VE: Tensor, right_VD: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[E, D] the product of the one's columns with the other's, over tokens a block at a time."""
    sum_ED = torch.zeros(left_VE.shape[1], right_VD.shape[1], dtype=dtype, device=device)
    blocks = zip(torch.split(left_VE, _BLOCK_TOKENS), torch.split(right_VD, _BLOCK_TOKENS), strict=True)
    for left_CE, right_CD in blocks:
        sum_ED.addmm_(left_CE.to(device, dtype).T, right_CD.to(device, dtype))
    return sum_ED
