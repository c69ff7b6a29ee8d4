"""The server's memory, inside SGLang's scheduler process."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from typing import assert_never

from kdmesh.handles.slab.memory import prefault
from kdmesh.sglang.messages import RECEIVE_BYTES, Adopt, Adopted, Drop, Hello, pack, unpack


class Segments:
    """The server's memory, as far as this process has it mapped."""

    def __init__(self) -> None:
        self._mappings: dict[int, mmap.mmap] = {}
        self._weights: int | None = None  # number of the segment that holds new ones

    def follow(self, server: socket.socket) -> None:
        """Do what the server says, in a thread, until it hangs up."""
        threading.Thread(target=self._follow, args=(server,), name="kdmesh-segments", daemon=True).start()

    def mapping(self, number: int) -> mmap.mmap | None:
        """A segment's memory; None when it is not mapped."""
        return self._mappings.get(number)

    def weights(self) -> mmap.mmap:
        """The segment that new weights lie in."""
        assert self._weights is not None
        return self._mappings[self._weights]

    def _follow(self, server: socket.socket) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(server, RECEIVE_BYTES, 1)
            if not data:
                return
            match unpack(data):
                case Adopt(number=number, size_bytes=size_bytes, holds_weights=holds_weights):
                    (descriptor,) = descriptors
                    self._map(number, descriptor, size_bytes)
                    if holds_weights:
                        self._weights = number
                    server.send(pack(Adopted(number=number)))
                case Drop(number=number):
                    # The mapping goes with the last tensor that was made of it.
                    self._mappings.pop(number, None)
                case Hello() | Adopted() as other:
                    raise AssertionError(f"the server sends no {other}")
                case unreachable:
                    assert_never(unreachable)

    def _map(self, number: int, descriptor: int, size_bytes: int) -> None:
        try:
            mapping = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        prefault(mapping)
        self._mappings[number] = mapping
