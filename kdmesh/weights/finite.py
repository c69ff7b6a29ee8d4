"""Whether numbers are finite, by their bits: not every type of theirs is known to numpy."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kdmesh.types import DType
from kdmesh.weights import digests

# Where all of these bits are set, the number is infinite or none.
_EXPONENTS: Final = {DType.FLOAT32: 0x7F80_0000, DType.BFLOAT16: 0x7F80, DType.FLOAT16: 0x7C00}


def are_finite(data: memoryview, dtype: DType) -> bool:
    """Whether all elements are; `data` is whole ones. Runs mostly without the interpreter lock."""
    exponent = _EXPONENTS[dtype]
    bits: npt.NDArray[Any] = np.frombuffer(data, f"u{dtype.size_bytes}").reshape(-1)
    step = digests.STEP_BYTES // dtype.size_bytes
    return all((bits[n : n + step] & exponent).max() != exponent for n in range(0, len(bits), step))
