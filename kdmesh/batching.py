"""Splits one optimizer step into micro-batches of equal work on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from kdmesh.errors import InvalidRequest


def plan_step(
    lengths: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    rows: Sequence[int] | None = None,
    max_rows: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Which sequences each rank trains on in each of its micro-batches.

    Every sequence appears exactly once, every micro-batch respects the caps, and
    all ranks have the same number of micro-batches, because each one is a
    collective. That number is as small as found; then the work is balanced. Pure.

    Args:
        lengths: tokens of each sequence of the step.
        rows: loss positions of each sequence; needed with `max_rows`.

    Returns:
        result[rank][k]: indices into `lengths`, ascending. A micro-batch may be
        empty (fewer sequences than ranks); its rank still takes part in the collectives.

    Raises:
        InvalidRequest: a single sequence exceeds a cap.
    """
    counted_rows = rows if rows is not None and max_rows is not None else [0] * len(lengths)
    row_cap = max_rows if rows is not None and max_rows is not None else 0
    for index, (tokens, sequence_rows) in enumerate(zip(lengths, counted_rows, strict=True)):
        if tokens > max_tokens:
            raise InvalidRequest(f"sequence {index} has {tokens} tokens; a micro-batch takes at most {max_tokens}")
        if sequence_rows > row_cap:
            raise InvalidRequest(f"sequence {index} has {sequence_rows} rows; a micro-batch takes at most {row_cap}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    for index in order:
        for members in bins:
            if (
                sum(lengths[i] for i in members) + lengths[index] <= max_tokens
                and sum(counted_rows[i] for i in members) + counted_rows[index] <= row_cap
            ):
                members.append(index)
                break
        else:
            bins.append([index])
    bins += [[] for _ in range(-len(bins) % ranks)]
    bins.sort(key=lambda members: -sum(lengths[i] for i in members))
    return [[tuple(sorted(members)) for members in bins[rank::ranks]] for rank in range(ranks)]
