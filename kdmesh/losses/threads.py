"""Runs elementwise work on several threads, each with its own share of the rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def run_each(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of all tasks; several run on threads of their own, where operators use one core and no gradient.

    Torch's own threads would meet after every operator, and a tile is worth microseconds: as soon as another
    process holds one of their cores, the others spin for it. (Measured: 10 times slower on a busy machine.)
    These threads meet once a block.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    # As many threads for few tasks as for many: a pool of another size would begin new ones.
    pool = _pool(max(len(tasks), torch.get_num_threads()))
    futures = [pool.submit(_without_gradient, task) for task in tasks]
    wait(futures)  # all of them, also when one fails: they write to matrices that are the caller's
    return [future.result() for future in futures]


def _without_gradient(task: Callable[[], T]) -> T:
    with torch.no_grad():  # a property of the thread
        return task()


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loss", initializer=_use_one_core)
    everyone = threading.Barrier(num_threads)
    wait([pool.submit(everyone.wait) for _ in range(num_threads)])
    # The initializers set their own threads' number, and besides that of threads yet to come: put it back.
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # the first question gives a thread the common number, which would undo what follows
    torch.set_num_threads(1)


# A forked child has the pool without its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
