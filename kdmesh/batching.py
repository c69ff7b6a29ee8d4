"""Splits one optimizer step into micro-batches of equal work on every rank."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdmesh.errors import InvalidRequest

# Bounds that keep planning far below the time of a step. Beyond them the plan is
# still valid, only perhaps not the best one.
_MAX_SEARCH_LOOKS = 50_000
_EXCHANGES_PER_BIN = 8
_PARTNERS = 8

HOME_COST = 1.01
"""How much longer a plan may keep the ranks busy so that sequences stay where they are."""
_LEVEL_ENOUGH = 0.005  # of a rank's tokens; to even out more would move more sequences


def plan_step(
    lengths: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    homes: Sequence[int | None] | None = None,
) -> list[list[tuple[int, ...]]]:
    """Which sequences each rank trains on in each of its micro-batches.

    Every sequence appears exactly once, no micro-batch exceeds `max_tokens`, and
    all ranks have the same number of micro-batches, because each one is a
    collective. First that number is made as small as a bounded search finds, then
    the sum over k of the largest k-th micro-batch, which is how long the ranks are
    kept busy. Larger micro-batches come first. Pure and deterministic.

    Args:
        lengths: tokens of each sequence of the step.
        homes: the rank that each sequence should stay on; None: any. Most do, as long as that keeps the ranks busy no
            more than HOME_COST times as long.

    Returns:
        result[rank][k]: indices into `lengths`, ascending. A micro-batch may be
        empty (fewer sequences than ranks); its rank still takes part in the collectives.

    Raises:
        InvalidRequest: a single sequence exceeds `max_tokens`.
    """
    items = _Items(lengths, max_tokens)
    plan = _share_out(_level(items, _fewest_bins(items, ranks), ranks), ranks)
    if homes is None or ranks == 1:
        return plan
    near = _near_home(items, homes, ranks, len(plan[0]))
    return near if near is not None and _busy(items, near) <= HOME_COST * _busy(items, plan) else plan


def shortest_first(plan: Sequence[Sequence[tuple[int, ...]]], lengths: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """The same micro-batches, those first whose longest sequence is the shortest over all ranks.

    Of equally long ones the earlier comes first. Micro-batches that meet at the same k still do.
    """
    longest = [max(((lengths[i], i) for m in at_k for i in m), default=(0, 0)) for at_k in zip(*plan, strict=True)]
    order = sorted(range(len(longest)), key=lambda k: longest[k])
    return [[micro_batches[k] for k in order] for micro_batches in plan]


@dataclass(slots=True, eq=False)
class _Bin:
    """One micro-batch being filled."""

    target: int  # tokens it should end with
    tokens: int = 0
    members: list[int] = field(default_factory=list)

    @property
    def excess(self) -> int:
        return self.tokens - self.target


class _Items:
    """The step's sequences and the cap they are packed under."""

    def __init__(self, lengths: Sequence[int], max_tokens: int) -> None:
        self.lengths, self.max_tokens = lengths, max_tokens
        for index, tokens in enumerate(lengths):
            if tokens > max_tokens:
                raise InvalidRequest(f"sequence {index} has {tokens} tokens; a micro-batch takes at most {max_tokens}")
        self.longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def uncapped(self) -> _Items:
        """The same sequences without a cap."""
        return _Items(self.lengths, sum(self.lengths))

    def fit(self, index: int, box: _Bin) -> bool:
        return box.tokens + self.lengths[index] <= self.max_tokens

    def put(self, index: int, box: _Bin) -> None:
        box.tokens += self.lengths[index]
        box.members.append(index)

    def take(self, index: int, box: _Bin) -> None:
        box.tokens -= self.lengths[index]
        box.members.remove(index)


def _fewest_bins(items: _Items, ranks: int) -> list[_Bin]:
    """A packing into a multiple of `ranks` bins, as few as the bounded search finds."""
    packing = _best_fit(items)
    packing += [_Bin(0) for _ in range(_round_up(len(packing), ranks) - len(packing))]
    least = max(-(-sum(items.lengths) // items.max_tokens), 1)
    for num_bins in range(len(packing) - ranks, least - 1, -ranks):
        smaller = _spread(items, [_Bin(t) for t in _targets(items, num_bins, ranks)]) or _search(items, num_bins)
        if smaller is None:
            break
        packing = smaller
    return packing


def _level(items: _Items, packing: list[_Bin], ranks: int) -> list[_Bin]:
    """As many bins as in `packing`, filled towards their targets; a bin of `packing` never grows past the cap."""
    targets = _targets(items, len(packing), ranks)
    bins = _spread(items, [_Bin(target) for target in targets])
    if bins is None:
        bins = sorted(packing, key=lambda box: -box.tokens)
        for box, target in zip(bins, targets, strict=True):
            box.target = target
    _exchange_until_level(items, bins)
    return bins


def _share_out(bins: list[_Bin], ranks: int) -> list[list[tuple[int, ...]]]:
    """Bins of like size at the same k; within one k the largest goes to the rank with the least work so far."""
    plan: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    by_size = sorted(bins, key=lambda box: (-box.tokens, box.members))
    for first in range(0, len(by_size), ranks):
        least_busy = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, box in zip(least_busy, by_size[first : first + ranks], strict=True):
            plan[rank].append(tuple(sorted(box.members)))
            work[rank] += box.tokens
    return plan


def _near_home(
    items: _Items, homes: Sequence[int | None], ranks: int, per_rank: int
) -> list[list[tuple[int, ...]]] | None:
    """`per_rank` micro-batches of each rank with few sequences away from home; None when they do not fit that way.

    First the ranks are made even, by few large moves; then each packs what it has.
    """
    targets = _targets(items, per_rank * ranks, ranks)
    plan = []
    for rank, members in enumerate(_even_shares(items, homes, [sum(targets[rank::ranks]) for rank in range(ranks)])):
        bins = _spread(items, [_Bin(target) for target in targets[rank::ranks]], members)
        if bins is None:
            return None
        _exchange_until_level(items, bins)
        plan.append([tuple(sorted(box.members)) for box in sorted(bins, key=lambda box: (-box.tokens, box.members))])
    return plan


def _even_shares(items: _Items, homes: Sequence[int | None], targets: Sequence[int]) -> list[Sequence[int]]:
    """The sequences of each rank, longest first: those at home, but for what makes the shares even."""
    free = items.uncapped()
    shares = [_Bin(target) for target in targets]
    for index in items.longest_first:
        if (home := homes[index]) is not None:
            free.put(index, shares[home])
    for index in items.longest_first:
        if homes[index] is None:
            free.put(index, min(shares, key=lambda share: share.excess))
    _exchange_until_level(free, shares, enough=round(_LEVEL_ENOUGH * max(targets)))
    rank_of = {index: rank for rank, share in enumerate(shares) for index in share.members}
    return [[index for index in items.longest_first if rank_of[index] == rank] for rank in range(len(shares))]


def _busy(items: _Items, plan: Sequence[Sequence[Sequence[int]]]) -> int:
    """Token times of the step: at each k all ranks wait for the largest micro-batch."""
    return sum(max(sum(items.lengths[i] for i in m) for m in at_k) for at_k in zip(*plan, strict=True))


def _targets(items: _Items, num_bins: int, ranks: int) -> list[int]:
    """Tokens each bin should hold, largest first, so that the sum over k of the largest is least.

    The mean, unless single sequences are longer: all ranks wait for such a one
    anyway, so its companions at the same k may be as large without any cost.
    """
    left, bins_left = sum(items.lengths), num_bins
    targets: list[int] = []
    for first in range(0, min(num_bins, len(items.lengths)), ranks):
        longest = items.lengths[items.longest_first[first]]
        if longest * bins_left <= left:
            break
        targets += [longest] * ranks
        left, bins_left = max(0, left - longest * ranks), bins_left - ranks
    return targets + [-(-left // bins_left)] * bins_left if bins_left else targets


def _spread(items: _Items, bins: list[_Bin], members: Sequence[int] | None = None) -> list[_Bin] | None:
    """Longest first, each into the bin that lacks most; None when one fits nowhere.

    Args:
        members: which sequences, longest first; None: all.
    """
    heap = [(box.excess, number) for number, box in enumerate(bins)]
    heapq.heapify(heap)
    for index in items.longest_first if members is None else members:
        refused = []
        while heap and not items.fit(index, bins[heap[0][1]]):
            refused.append(heapq.heappop(heap))
        if not heap:
            return None
        number = heap[0][1]
        items.put(index, bins[number])
        heapq.heapreplace(heap, (bins[number].excess, number))
        for entry in refused:
            heapq.heappush(heap, entry)
    return bins


def _best_fit(items: _Items) -> list[_Bin]:
    """Longest first, each into the fullest bin it fits, or into a new one."""
    bins: list[_Bin] = []
    by_room: list[tuple[int, int]] = []  # (tokens that still fit, number of the bin), ascending
    for index in items.longest_first:
        at = bisect_left(by_room, (items.lengths[index], 0))
        if at < len(by_room):
            number = by_room.pop(at)[1]
        else:
            number = len(bins)
            bins.append(_Bin(0))
        items.put(index, bins[number])
        insort(by_room, (items.max_tokens - bins[number].tokens, number))
    return bins


def _search(items: _Items, num_bins: int) -> list[_Bin] | None:
    """A packing into `num_bins` bins by depth-first search; None when there is none or the search took too long."""
    bins = [_Bin(0) for _ in range(num_bins)]
    placed: list[int] = []  # bin of each item, along longest_first
    first = 0  # first bin to try for the next item
    looks = 0
    while len(placed) < len(items.lengths):
        index = items.longest_first[len(placed)]
        looks += num_bins
        number = _next_bin(items, bins, index, first)
        if number is not None:
            items.put(index, bins[number])
            placed.append(number)
            first = 0
        elif placed and looks < _MAX_SEARCH_LOOKS:
            number = placed.pop()
            items.take(items.longest_first[len(placed)], bins[number])
            first = number + 1
        else:
            return None
    return bins


def _next_bin(items: _Items, bins: list[_Bin], index: int, first: int) -> int | None:
    """The first bin from `first` on that the item fits, unless an earlier one has the same content."""
    tried = {box.tokens for box in bins[:first]}
    for number in range(first, len(bins)):
        box = bins[number]
        # Bins filled alike are interchangeable: trying one of them is enough.
        if box.tokens not in tried and items.fit(index, box):
            return number
        tried.add(box.tokens)
    return None


def _exchange_until_level(items: _Items, bins: list[_Bin], *, enough: int = 0) -> None:
    """Move or swap sequences from the bin most above its target to those most below, while that helps.

    Args:
        enough: tokens above its target that a bin may keep.
    """
    order = sorted(range(len(bins)), key=lambda n: (bins[n].excess, n))
    for _ in range(_EXCHANGES_PER_BIN * len(bins)):
        if len(order) < 2:
            return
        heavy = order.pop()
        if bins[heavy].excess <= enough:
            return
        for at, light in enumerate(order[:_PARTNERS]):
            if _exchange(items, bins[heavy], bins[light]):
                order.pop(at)
                insort(order, light, key=lambda n: (bins[n].excess, n))
                insort(order, heavy, key=lambda n: (bins[n].excess, n))
                break


def _exchange(items: _Items, heavy: _Bin, light: _Bin) -> bool:
    """Do the one move or swap that best evens out two bins; False when none helps."""
    gap = heavy.excess - light.excess
    best: tuple[int, int, int | None] | None = None
    partners = sorted((items.lengths[i], i) for i in light.members)
    for given in heavy.members:
        # The tokens that change sides should be gap / 2.
        at = bisect_left(partners, (items.lengths[given] - gap // 2, 0))
        candidates: list[tuple[int, int | None]] = [(0, None), *partners[max(0, at - 1) : at + 1]]
        for length, taken in candidates:
            moved = items.lengths[given] - length
            distance = abs(2 * moved - gap)
            fits = light.tokens + moved <= items.max_tokens
            if 0 < moved < gap and fits and (best is None or distance < best[0]):
                best = (distance, given, taken)
    if best is None:
        return False
    _, given, taken = best
    items.take(given, heavy)
    items.put(given, light)
    if taken is not None:
        items.take(taken, light)
        items.put(taken, heavy)
    return True


def _round_up(count: int, multiple: int) -> int:
    """The least multiple that is at least `count`, and at least one of them."""
    return max(1, -(-count // multiple)) * multiple
