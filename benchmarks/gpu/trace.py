"""Where a step's time goes, as the profiler sees it: head, body, optimizer, nothing; and which calls wait for it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.scale import Scale, median_ms, normal
from benchmarks.gpu.step import AdamWSettings, build_student, descend, packed_tokens
from kdmesh.losses import FusedLoss, OutputHead, Workspace, build_divergence, fused_linear_divergence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.student.compiled_layers import compile_layers
from kdmesh_trainer.student.model import begin_micro_batch, shard

if TYPE_CHECKING:
    from kdmesh_trainer.sections.parallel_config import Gather  # which needs pydantic

# Name, whether layers are compiled, and parallel.gather.
_VARIANTS: tuple[tuple[str, bool, Gather], ...] = (
    ("layers as they are", False, "auto"),
    ("layers as they are, shards of one rank", False, "micro_batch"),
    ("compiled layers", True, "auto"),
)
_STEPS = 3
_PARTS = ("head", "forward", "backward", "optimizer")  # the first is within the second
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories
_NAME_LENGTH = 60


@dataclass(frozen=True, slots=True)
class _Span:
    """Microseconds."""

    begin: float
    end: float


def measure(scale: Scale) -> dict[str, object]:
    """Of a step in bfloat16 that nothing interrupts, with layers as they are and compiled, and with a student that the
    rank keeps whole and with FSDP: milliseconds and shares of its parts, calls that wait, kernels."""
    is_tiny = scale.device.type == "cpu"
    figures: dict[str, object] = {}
    with joined("cpu" if is_tiny else "cuda", longest_wait_s=60) as mesh:
        for name, is_compiled, gather in _VARIANTS[: 2 if is_tiny else None]:
            figures[name] = _measure(scale, mesh, is_compiled=is_compiled, gather=gather)
            if not is_tiny:
                torch.cuda.empty_cache()
    return figures


def _measure(scale: Scale, mesh: Mesh, *, is_compiled: bool, gather: Gather) -> dict[str, object]:
    is_tiny = scale.device.type == "cpu"
    student = build_student(scale)
    if is_compiled:
        compile_layers(student.lm)
    shard(student, mesh.device_mesh, compute_dtype=torch.float32 if is_tiny else torch.bfloat16, gather=gather)
    optimizer = build_adamw(student, AdamWSettings())  # type: ignore[arg-type]
    packed = packed_tokens(scale, together=not is_tiny).to(scale.device)
    rows_RE = normal(packed.num_rows, scale.teacher_size, scale, seed=1)
    teacher = OutputHead(weight_VD=normal(scale.vocabulary, scale.teacher_size, scale, deviation=0.02, seed=2))
    divergence, workspace = build_divergence("forward_kl"), Workspace()
    host_ms: dict[str, list[float]] = {name: [] for name in _PARTS}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        with record_function(name):
            yield
        host_ms[name].append((time.perf_counter() - began_s) * 1e3)

    def row_loss(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
        with part("head"):
            return fused_linear_divergence(
                hidden_RD,
                head,
                rows_RE,
                teacher,
                divergence=divergence,
                labels_R=labels_R,
                workspace=workspace,
            )

    def step() -> None:
        begin_micro_batch(student, is_last=True)
        with part("forward"):
            loss_sum = student(packed, row_loss).loss_sum
        with part("backward"):
            (loss_sum / packed.num_rows).backward()
        with part("optimizer"):
            descend(student, optimizer)

    student.train()
    for _ in range(2):  # compile and fill caches
        step()
    events = traced(lambda: [step() for _ in range(_STEPS)], scale)
    for times in host_ms.values():
        times.clear()
    untraced_ms = median_ms(step, scale, warmups=0)
    return {
        "tokens": packed.num_tokens,
        "step without the profiler (ms)": round(untraced_ms, 2),
        "the host's own (ms)": {name: round(statistics.median(times), 2) for name, times in host_ms.items()},
        **shares(events),
        "kernels of the head (ms)": kernels_of(events, within="head"),
    }


def traced(call: Callable[[], object], scale: Scale) -> list[dict[str, Any]]:
    """What the profiler noted while `call` ran: a Chrome trace's events that have a duration."""
    on_gpu = scale.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        with record_function("everything"):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def shares(events: list[dict[str, Any]]) -> dict[str, object]:
    """Milliseconds of a step on the GPU by part, of all its kernels, without any; and calls that waited for it."""
    launches = _launches(events)
    busy = sorted((_span(event) for event in events if event.get("cat") in _ON_GPU), key=lambda span: span.begin)
    everything = _ranges(events, "everything")
    if not busy or not everything:
        return {"shares": "nothing ran on a GPU"}
    spans = {name: _ranges(events, name) for name in _PARTS}
    took: Counter[str] = Counter()
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        launched = launches.get(event["args"].get("correlation"), event["ts"])
        part = next((name for name in _PARTS if _is_within(launched, spans[name])), "other")
        took[part] += event["dur"]
    covered, reached = 0.0, busy[0].begin
    for span in busy:
        covered += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    whole = reached - min(everything[0].begin, busy[0].begin)
    waits = [
        event["name"]
        for event in events
        if event["name"].startswith(_WAITS)
        and not event["name"].endswith("Async")
        and _is_within(event["ts"], everything)
    ]
    return {
        "step (ms)": round(whole / _STEPS / 1e3, 2),
        **{f"{name} (ms)": round(took[name] / _STEPS / 1e3, 2) for name in (*_PARTS, "other") if took[name]},
        "head, of the step": round(took["head"] / whole, 3),
        "GPU without work, of the step": round(1 - covered / whole, 3),
        "calls that wait, in a step": dict(Counter(waits)),
    }


def kernels_of(events: list[dict[str, Any]], *, within: str, times: int = _STEPS, most: int = 8) -> dict[str, float]:
    """Milliseconds of the kernels that were launched inside a range, summed by name, of one of `times` calls."""
    launches, spans = _launches(events), _ranges(events, within)
    took: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in _ON_GPU and _is_within(
            launches.get(event["args"].get("correlation"), event["ts"]), spans
        ):
            took[event["name"][:_NAME_LENGTH]] += event["dur"]
    return {name: round(us / times / 1e3, 3) for name, us in took.most_common(most)}


def _launches(events: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """When the host asked for what runs on the GPU, by the number that both have."""
    return {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }


def _ranges(events: Iterable[Mapping[str, Any]], name: str) -> list[_Span]:
    return [_span(event) for event in events if event["name"] == name and event.get("cat") == "user_annotation"]


def _span(event: Mapping[str, Any]) -> _Span:
    return _Span(event["ts"], event["ts"] + event["dur"])


def _is_within(moment: float, spans: Iterable[_Span]) -> bool:
    return any(span.begin <= moment <= span.end for span in spans)
