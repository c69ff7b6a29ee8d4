"""Rows of the training data that are held out; which ones, each row's own words decide."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

from kdmesh.chats.chat_rows import Chat
from kdmesh.errors import DataError
from kdmesh_trainer.data.files.readers import Reader

_ALL = 2**64


def is_held_out(chat: Chat, share: float) -> bool:
    """Whether the row is one of the `share` of all rows that are.

    It follows from its messages alone: not from seed, place, file, or the rows beside it. Rows that say the same are on
    the same side, and those of a smaller share are among those of a larger.
    """
    state = hashlib.blake2b(digest_size=8, person=b"kdmesh.held_out")
    for message in chat.messages:
        for octets in (message.role.encode(), message.content.encode(), *(image.digest for image in message.images)):
            state.update(len(octets).to_bytes(8, "little") + octets)
    return int.from_bytes(state.digest(), "little") < share * _ALL


def trained_rows(chats: Iterable[Chat], share: float | None) -> Iterator[Chat]:
    """Those that are not held out; None: no share of them is."""
    return (chat for chat in chats if share is None or not is_held_out(chat, share))


def trained_reader(name: str, read: Reader, share: float) -> Reader:
    """The other rows of dataset `name`. The reader raises DataError when there is none."""
    return lambda: _some(trained_rows(read(), share), all_held_out(name, share))


def held_out_reader(readers: Sequence[Reader], share: float) -> Reader:
    """The held-out rows of all datasets, from each one in turn, so that the first ones are of all of them.

    The reader raises DataError when there is none.
    """
    none = DataError(f"data.held_out ({share:g}) takes none of the rows of data.train; take a larger share")
    return lambda: _some(_in_turn([filter(lambda chat: is_held_out(chat, share), read()) for read in readers]), none)


def all_held_out(name: str, share: float) -> DataError:
    """Nothing of dataset `name` is left to train on."""
    return DataError(f"dataset {name}: data.held_out ({share:g}) takes all of its rows; take a smaller share")


def _in_turn(parts: Sequence[Iterator[Chat]]) -> Iterator[Chat]:
    return (chat for chats in itertools.zip_longest(*parts) for chat in chats if chat is not None)


def _some(chats: Iterator[Chat], none: DataError) -> Iterator[Chat]:
    """Raises `none` when there is none."""
    first = next(chats, None)
    if first is None:
        raise none
    yield first
    yield from chats
