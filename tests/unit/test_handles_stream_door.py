"""The stream door makes tensors of chunks, in memory that it uses again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import torch

from kdmesh.errors import EngineFailure, HandleGone, Unavailable
from kdmesh.handles.doors.door import Door
from kdmesh.handles.doors.stream import StreamDoor
from kdmesh.types import DType, Handle


def handle_to(rows: int, cols: int, dtype: DType = DType.FLOAT32) -> Handle:
    return Handle(segment=0, epoch=1, token=bytes(16), offset_bytes=0, rows=rows, cols=cols, dtype=dtype)


class Server:
    """Streams what it is given, in pieces of `step` bytes."""

    def __init__(self, data: bytes, step: int = 1000) -> None:
        self.data = data
        self.step = step
        self.released: list[Handle] = []

    async def read(self, handle: Handle) -> AsyncIterator[memoryview]:
        for start in range(0, len(self.data), self.step):
            yield memoryview(self.data)[start : start + self.step]

    def door(self) -> StreamDoor:
        return StreamDoor(self.read, self.released.append)


@pytest.mark.parametrize("dtype", DType)
async def test_tensor_has_the_bytes_and_the_handle_is_released(dtype: DType) -> None:
    data = np.random.default_rng(0).bytes(30 * 7 * dtype.size_bytes)
    server = Server(data, step=13)
    door: Door = server.door()
    handle = handle_to(30, 7, dtype)
    tensor = await door.fetch(handle)
    assert (tensor.shape, tensor.dtype) == ((30, 7), getattr(torch, dtype))
    assert tensor.view(torch.uint8).numpy().tobytes() == data
    assert server.released == [handle]


@pytest.mark.parametrize("sizes", [[], [39], [41], [40, 1], [20, 19], [400]])
async def test_stream_of_another_length_is_refused_and_released(sizes: Sequence[int]) -> None:
    async def read(handle: Handle) -> AsyncIterator[memoryview]:
        for size in sizes:
            yield memoryview(bytes(size))

    released: list[Handle] = []
    with pytest.raises(EngineFailure, match="40 bytes"):
        await StreamDoor(read, released.append).fetch(handle_to(2, 5))
    assert len(released) == 1


async def test_memory_is_used_again_but_never_while_a_view_lives() -> None:
    server = Server(bytes(4000))
    door = server.door()
    first = await door.fetch(handle_to(10, 100))
    address = first.data_ptr()
    view = first[3:5, 7:]
    del first
    second = await door.fetch(handle_to(10, 100))
    assert second.data_ptr() != address
    server.data = np.ones(900, np.float32).tobytes()
    del view
    third = await door.fetch(handle_to(9, 100))
    assert third.data_ptr() == address
    assert (third == 1).all() and (second == 0).all()


async def test_memory_lives_until_backward_has_used_it() -> None:
    server = Server(np.full(100, 3, np.float32).tobytes())
    door = server.door()
    weight = torch.ones(10, requires_grad=True)
    loss = ((await door.fetch(handle_to(10, 10))) @ weight).sum()
    server.data = bytes(400)
    await door.fetch(handle_to(10, 10))
    loss.backward()
    assert weight.grad is not None and (weight.grad == 30).all()


async def test_handles_of_many_sizes_do_not_pile_up_memory() -> None:
    server = Server(b"")
    door = server.door()
    for rows in (1, 10, 100, 1000, 100, 10, 2000, 1, 3000):
        server.data = bytes(rows * 400)
        await door.fetch(handle_to(rows, 100))
    assert len(door._spares) == 1


async def test_error_of_the_server_passes_through() -> None:
    async def read(handle: Handle) -> AsyncIterator[memoryview]:
        yield memoryview(bytes(4))
        raise HandleGone("gone")

    released: list[Handle] = []
    with pytest.raises(HandleGone):
        await StreamDoor(read, released.append).fetch(handle_to(2, 1))
    assert len(released) == 1


async def test_closed_door_fetches_no_more() -> None:
    has_begun, never = asyncio.Event(), asyncio.Event()

    async def read(handle: Handle) -> AsyncIterator[memoryview]:
        yield memoryview(bytes(4))
        has_begun.set()
        await never.wait()
        yield memoryview(bytes(4))

    released: list[Handle] = []
    door = StreamDoor(read, released.append)
    fetching = asyncio.create_task(door.fetch(handle_to(2, 1)))
    await has_begun.wait()
    door.close()
    never.set()
    with pytest.raises(Unavailable):
        await fetching
    with pytest.raises(Unavailable):
        await door.fetch(handle_to(2, 1))
    assert len(released) == 1
