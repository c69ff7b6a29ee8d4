"""The sizes that are measured, and how."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK_FLOP_PER_S = 790e12  # dense bfloat16 products on an H100 or H200, as measured by others


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One run's sizes. The defaults are those that the targets are stated for."""

    device: torch.device
    rows: int = 8192
    vocabulary: int = 151_936
    student_size: int = 2560
    teacher_size: int = 2048
    chunk_rows: int = 2048
    rounds: int = 10

    @property
    def loss_flop(self) -> int:
        """Of the four products: the teacher's logits, the student's, and the student's two gradients."""
        return 2 * self.rows * self.vocabulary * (self.teacher_size + 3 * self.student_size)

    @property
    def floor_ms(self) -> float:
        """Of the loss, were its products all there is and as fast as they ever are."""
        return self.loss_flop / PEAK_FLOP_PER_S * 1e3


def choose(*, is_dry: bool) -> Scale:
    """The full size on a GPU; a tiny one on a CPU, which shows that it runs and measures nothing."""
    if not is_dry:
        return Scale(device=torch.device("cuda"))
    return Scale(
        device=torch.device("cpu"), rows=24, vocabulary=300, student_size=16, teacher_size=24, chunk_rows=8, rounds=1
    )


def median_ms(call: Callable[[], object], scale: Scale, *, warmups: int = 2, rest_s: float = 0.0) -> float:
    """Of one call, on the device's own clock; `rest_s` before each, in which a hot device regains its clock."""
    for _ in range(warmups):
        call()
    times: list[float] = []
    for _ in range(scale.rounds):
        time.sleep(rest_s)
        if scale.device.type == "cpu":
            began_s = time.perf_counter()
            call()
            times.append((time.perf_counter() - began_s) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_gib(call: Callable[[], object], scale: Scale) -> float | None:
    """Most memory of torch's allocator above what was held before the call; None on a CPU."""
    if scale.device.type == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def normal(rows: int, columns: int, scale: Scale, *, deviation: float = 1.0, seed: int = 0) -> Tensor:
    """[rows, columns] bfloat16."""
    generator = torch.Generator(scale.device).manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, device=scale.device) * deviation).bfloat16()
