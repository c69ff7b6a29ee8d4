"""Random token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdmesh.types import TokenSequence


def random_sequences(lengths: Sequence[int], *, vocabulary_size: int, seed: int = 0) -> list[TokenSequence]:
    """One sequence per length, each asking for a random half of its positions, at least one."""
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(
            token_ids=rng.integers(0, vocabulary_size, length, dtype=np.int32),
            positions=np.sort(rng.permutation(length - 1)[: max(1, (length - 1) // 2)]).astype(np.int32),
        )
        for length in lengths
    ]
