"""The clients of the benchmark `soak`: trainers that go on, and jobs that come and go."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence

VOCABULARY_SIZE = 1000
MAX_TOKENS = 4096
_PREFETCH = 4
_UPDATE_S = 0.01
_START_S = 60.0
_JOB_MICRO_BATCHES = 20

_processes = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A running client."""

    process: BaseProcess
    answers: Any  # a shared value: how many it has got

    @property
    def is_there(self) -> bool:
        """Whether it still runs."""
        return self.process.is_alive()


@contextmanager
def trainers(addresses: Sequence[str], doors: Sequence[DoorChoice]) -> Iterator[list[Trainer]]:
    """One for each door, each of which has got its first rows; ended on exit."""
    stop = _processes.Event()
    running: list[Trainer] = []
    for number, door in enumerate(doors):
        answers = _processes.Value("q", 0)
        process = _processes.Process(target=_train, args=(addresses, door, number, answers, stop), daemon=True)
        process.start()
        running.append(Trainer(process=process, answers=answers))
    try:
        ends_s = time.monotonic() + _START_S
        while not all(trainer.answers.value for trainer in running):
            if time.monotonic() > ends_s or not all(trainer.is_there for trainer in running):
                raise SystemExit("a client did not start")
            time.sleep(0.05)
        yield running
    finally:
        stop.set()
        for trainer in running:
            trainer.process.join(30)
            trainer.process.kill()


def run_job(addresses: Sequence[str], number: int) -> None:
    """A job from its start to its end in a process of its own; every second one is killed with rows in its hands."""
    process = _processes.Process(target=_short_job, args=(addresses, number), daemon=True)
    process.start()
    process.join(_START_S)
    process.kill()
    process.join()


def _train(addresses: Sequence[str], door: DoorChoice, seed: int, answers: Any, stop: Any) -> None:
    """As a trainer: asks ahead, waits for the oldest, works on it, lets go of it."""
    rng = np.random.default_rng(seed)
    with TeacherPool(addresses, job=f"trainer {seed}", door=door) as pool:
        asked = deque[tuple[list[TokenSequence], Any]]()
        while not stop.is_set():
            while len(asked) <= _PREFETCH:
                sequences = _micro_batch(rng)
                asked.append((sequences, pool.submit(sequences)))
            sequences, pending = asked.popleft()
            rows = pending.wait()
            assert len(rows.rows_RD) == sum(sequence.num_rows for sequence in sequences)
            rows.rows_RD.float().sum()
            del rows, pending
            time.sleep(_UPDATE_S)
            answers.value += 1


def _short_job(addresses: Sequence[str], number: int) -> None:
    rng = np.random.default_rng(number)
    with TeacherPool(addresses, job=f"job {number % 8}") as pool:
        asked = deque(pool.submit(_micro_batch(rng)) for _ in range(_PREFETCH))
        for _ in range(_JOB_MICRO_BATCHES):
            rows = asked.popleft().wait()
            asked.append(pool.submit(_micro_batch(rng)))
        if number % 2 and len(rows.rows_RD):
            os._exit(1)


def _micro_batch(rng: np.random.Generator) -> list[TokenSequence]:
    """Chats of skewed lengths that fill a micro-batch; answers are the second half."""
    sequences: list[TokenSequence] = []
    left = MAX_TOKENS
    while (length := int(min(max(rng.lognormal(5.5, 0.8), 16), 2048))) <= left:
        ids = rng.integers(0, VOCABULARY_SIZE, length, dtype=np.int32)
        sequences.append(TokenSequence(token_ids=ids, positions=np.arange(length // 2, length - 1, dtype=np.int32)))
        left -= length
    return sequences
