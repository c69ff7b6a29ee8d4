"""A sequence whose items are made when they are looked at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """Its subclasses say how many items there are, and make each."""

    @abstractmethod
    def item(self, number: int) -> T:
        """The item at `number`, from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        found = range(len(self))[index]
        return self.item(found) if isinstance(found, int) else tuple(map(self.item, found))
