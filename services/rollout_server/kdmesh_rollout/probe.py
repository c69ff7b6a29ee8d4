"""Whether a loaded engine samples: asked before it serves, and after it has failed."""

from __future__ import annotations

import numpy as np

from kdmesh.errors import EngineFailure, InvalidRequest
from kdmesh.types import Sampling
from kdmesh_rollout.engine import Engine, EngineDescription, Order

_KEYS = (-1, -2)  # orders have keys from 0 on
_NEW_TOKENS = 3


def check_samples(engine: Engine, model: EngineDescription) -> None:
    """Draw two short samples of one fixed prompt. Blocks for that long; nothing else may be under way.

    Raises:
        EngineFailure: a token is none of the model's, a log-probability is no number, or they do not come.
    """
    length = min(5, model.max_sequence_tokens - 1)
    ids = np.arange(1, length + 1, dtype=np.int64) * 7919 % model.vocabulary_size
    keys = _KEYS[: model.max_running]
    for key in keys:
        sampling = Sampling(max_new_tokens=_NEW_TOKENS)
        engine.add(Order(key=key, prompt_ids=ids.astype(np.int32), sampling=sampling, seed=0))
    try:
        finished = [one for _ in range(_NEW_TOKENS) for one in engine.step()]
    except InvalidRequest as error:
        raise EngineFailure(f"the model does not give a probability for token ids {ids.tolist()}: {error}") from None
    if engine.num_running or len(finished) != len(keys):
        raise EngineFailure(f"of {len(keys)} samples, {len(finished)} came in {_NEW_TOKENS} steps")
    largest = max(int(one.sample.token_ids.max()) for one in finished)
    if largest >= model.vocabulary_size:
        raise EngineFailure(f"the engine drew token {largest}; the model has {model.vocabulary_size}")
