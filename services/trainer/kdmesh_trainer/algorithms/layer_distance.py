"""How far the student's hidden states below the last are from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdmesh.losses import cosine_distance, mean_squared_distance
from kdmesh.models.packing import moved

_DISTANCES = {"cosine": cosine_distance, "mse": mean_squared_distance}


class LayerDistance(nn.Module):
    """Mean over pairs of layers of the distance between P h_s and h_t, h being what a layer gives.

    P is a matrix that is trained, one for each pair, where the two have other widths; else there is none.

    Attributes:
        of_student: its layers, ascending.
        num_teacher_layers: of which a row of the teacher has the outputs.

    Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679: intermediate states through a linear map;
    Sanh et al. 2019 (DistilBERT), arXiv:1910.01108: the cosine.
    """

    def __init__(
        self,
        pairs: Mapping[int, int],
        *,
        distance: Literal["cosine", "mse"],
        student_width: int,
        teacher_width: int,
    ) -> None:
        """
        Args:
            pairs: the teacher's layer by the student's.
        """
        super().__init__()
        asked = sorted(set(pairs.values()))
        self.of_student = tuple(sorted(pairs))
        self.num_teacher_layers = len(asked)
        # The final hidden state is first in a row, and each layer's output follows.
        self._places = [1 + asked.index(pairs[layer]) for layer in self.of_student]
        self._width = teacher_width
        self._distance = _DISTANCES[distance]
        has_maps = student_width != teacher_width
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in self._places if has_maps)

    def forward(self, student: Sequence[Tensor], teacher_RC: Tensor) -> Tensor:
        """
        Args:
            student: [R, D] of each of its layers, ascending.
            teacher_RC: its rows, of the final hidden state and the output of each of its layers, ascending.

        Returns:
            [R] at least float32.
        """
        total_R: Tensor | None = None
        for number, (place, hidden_RD) in enumerate(zip(self._places, student, strict=True)):
            hidden_RE = self.maps[number](hidden_RD) if self.maps else hidden_RD
            columns = slice(place * self._width, (place + 1) * self._width)
            distance_R = self._distance(hidden_RE, moved(teacher_RC[:, columns], hidden_RE.device))
            total_R = distance_R if total_R is None else total_R + distance_R
        assert total_R is not None
        return total_R / len(self._places)

    def nothing(self) -> Tensor:
        """0, of which each of its parameters has a gradient, of zeros."""
        return sum((parameter.flatten()[:0].sum() for parameter in self.parameters()), torch.zeros(()))
