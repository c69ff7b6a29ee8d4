"""Slots that can be lent, and to whom: what one job has mapped is never written for another."""

from __future__ import annotations

_NOBODY = None


class FreeSlots:
    """A stack for each job whose clients may still map a slot's memory, and one of slots that nobody maps.

    Stacks, because the slot used last is the warmest.
    """

    def __init__(self, num_slots: int) -> None:
        self._stacks: dict[str | None, list[int]] = {_NOBODY: list(reversed(range(num_slots)))}

    def __bool__(self) -> bool:
        return any(self._stacks.values())

    def put(self, index: int, mapped_by: str | None) -> None:
        """A slot came free; clients of this job may map it, or nobody does."""
        self._stacks.setdefault(mapped_by, []).append(index)

    def has(self, job: str) -> bool:
        """Whether there is one that no other job may map."""
        return bool(self._stacks.get(job) or self._stacks[_NOBODY])

    def take(self, job: str) -> int:
        """That one; there must be one."""
        return self._pop(job if self._stacks.get(job) else _NOBODY)

    def take_any(self) -> int:
        """One of the job that has most of them, whose memory must be replaced; there must be one."""
        return self._pop(max(self._stacks, key=lambda job: len(self._stacks[job])))

    def clear(self) -> list[int]:
        """All of them."""
        indices = [index for stack in self._stacks.values() for index in stack]
        self._stacks = {_NOBODY: []}
        return indices

    def _pop(self, job: str | None) -> int:
        stack = self._stacks[job]
        index = stack.pop()
        if not stack and job is not _NOBODY:
            del self._stacks[job]
        return index
