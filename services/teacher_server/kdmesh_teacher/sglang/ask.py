"""What the teacher asks of a prompt, inside SGLang's own requests: which hidden states, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kdmesh.types import DType, Int32Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """Which rows of a sequence are wanted, and where."""

    segment: int  # number of the segment
    offset_bytes: int  # of the first row
    dtype: DType
    first_computed: int  # no hidden state from here on may come out of the prefix cache
    positions: Int32Array  # [R]
    layers: tuple[int, ...] = ()  # whose outputs follow the final hidden state in every row

    def to_params(self) -> dict[str, int | str | list[int]]:
        """For custom_params, which hold numbers, strings and flat lists; positions as runs [begin, end)."""
        breaks = np.flatnonzero(np.diff(self.positions) != 1) + 1
        begins = self.positions[np.concatenate(([0], breaks))]
        ends = self.positions[np.concatenate((breaks - 1, [-1]))] + 1
        return {
            "kdmesh_segment": self.segment,
            "kdmesh_offset_bytes": self.offset_bytes,
            "kdmesh_dtype": self.dtype.value,
            "kdmesh_first_computed": self.first_computed,
            "kdmesh_runs": np.stack((begins, ends), axis=1).ravel().tolist(),
            **({"kdmesh_layers": list(self.layers)} if self.layers else {}),
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Self | None:
        """None when the request is not one of ours."""
        if params is None or "kdmesh_segment" not in params:
            return None
        runs = params["kdmesh_runs"]
        return cls(
            segment=params["kdmesh_segment"],
            offset_bytes=params["kdmesh_offset_bytes"],
            dtype=DType(params["kdmesh_dtype"]),
            first_computed=params["kdmesh_first_computed"],
            positions=np.concatenate(
                [np.arange(a, b, dtype=np.int32) for a, b in zip(runs[::2], runs[1::2], strict=True)]
            ),
            layers=tuple(layers_asked(params)),
        )


def layers_asked(params: Mapping[str, Any] | None) -> Sequence[int]:
    """Of a request, by its custom_params; none where it is not one of ours."""
    layers: Sequence[int] = () if params is None else params.get("kdmesh_layers", ())
    return layers
