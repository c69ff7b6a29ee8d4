"""Orders that are the same for ever: on every machine, and with every release of numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def shuffled(number: int, *key: int) -> npt.NDArray[np.int64]:
    """[number] the numbers below it, in an order that `key` names.

    By sorting raw random words: numpy keeps those the same for ever, which it does not
    promise of `Generator.permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(number)
    return np.argsort(words, kind="stable")
