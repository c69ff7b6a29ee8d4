"""Sequences to ask for, and the rows that the fake engine must answer with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdmesh.types import TokenSequence
from kdmesh_teacher.fake_engine import hidden_states


def sequence(num_tokens: int, *, seed: int = 0, every: int = 1, vocabulary_size: int = 60) -> TokenSequence:
    """Random ids, with every `every`-th position wanted."""
    ids = np.random.default_rng(seed).integers(0, vocabulary_size, num_tokens)
    return TokenSequence(token_ids=ids.astype(np.int32), positions=np.arange(0, num_tokens - 1, every, dtype=np.int32))


def expected_rows(sequences: Sequence[TokenSequence], hidden_size: int = 8, *, layers: Sequence[int] = ()) -> Tensor:
    """[R, (1 + layers) * D] float32."""
    return torch.from_numpy(np.concatenate([hidden_states(s, hidden_size, layers) for s in sequences]))
