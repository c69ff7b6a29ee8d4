"""Which requests wait for another, so that a common beginning is computed once.

SGLang reuses what a *finished* request has left in its cache; requests that start together compute a prompt
each. The samples of one prompt come together, so one of them goes ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.types import TokenSequence
from kdmesh_teacher.sglang.ask import Ask

Request = tuple[TokenSequence, Ask]

# Below, a round trip to the scheduler costs more than the tokens.
_MIN_SHARED_TOKENS = 32


def waves(requests: Sequence[Request]) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Indices of requests that share nothing; and, for each prompt that several have, who goes ahead and who follows.

    Two share a prompt when their first wanted rows are at the same place and all tokens before are equal.
    """
    by_prompt: dict[bytes, list[int]] = {}
    alone = []
    for index, (sequence, ask) in enumerate(requests):
        if ask.first_computed < _MIN_SHARED_TOKENS:
            alone.append(index)
        else:
            by_prompt.setdefault(sequence.token_ids[: ask.first_computed].tobytes(), []).append(index)
    alone += [indices[0] for indices in by_prompt.values() if len(indices) == 1]
    return alone, [(indices[0], indices[1:]) for indices in by_prompt.values() if len(indices) > 1]
