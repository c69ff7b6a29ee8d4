"""All weights of a 0.5B-parameter model from a trainer's process to a server's, on one node.

Every byte is copied twice, into the bucket and out of it, and digested twice, each time by one thread of
either process. It is compared with one copy of the same tensors by one thread, and by as many threads as torch takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import finish, say, server, table
from benchmarks.weight_server import FINGERPRINT
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import DType
from kdmesh.weights.buckets import MAX_BUCKET_BYTES
from kdmesh.weights.doors import DoorChoice
from kdmesh.weights.manifest import TensorSpec
from kdmesh.weights.packing import Weights

_WARM_UP = 2  # the server touches each of its two copies once


def _shapes() -> dict[str, tuple[int, ...]]:
    """Qwen2.5-0.5B, head tied: 494 million parameters."""
    hidden, heads, inner, vocabulary, layers = 896, 128, 4864, 151936, 24
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.q_proj.bias": (hidden,),
            f"{prefix}.self_attn.k_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.k_proj.bias": (heads,),
            f"{prefix}.self_attn.v_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.v_proj.bias": (heads,),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return {**shapes, "model.norm.weight": (hidden,)}


def _makers(weights: Mapping[str, Tensor]) -> Weights:
    return [
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DType.BFLOAT16), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in weights.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timings:
    """Seconds."""

    sent: list[float]  # of an update
    copied: list[float]  # of one copy of all tensors by one thread
    copied_by_all: list[float]  # by torch's threads


def _time_door(
    door: DoorChoice, weights: Mapping[str, Tensor], folder: Path, *, repeats: int, bucket_bytes: int
) -> _Timings:
    """After the first ones, of each update and of the copies measured before it."""
    ready, specs = folder / f"{door}.json", folder / "specs.json"
    specs.write_text(json.dumps([[name, tensor.shape] for name, tensor in weights.items()]), encoding="utf-8")
    copies = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    timings = _Timings(sent=[], copied=[], copied_by_all=[])
    command = [sys.executable, "-m", "benchmarks.weight_server", str(ready), str(specs)]
    with server(command, ready) as address, WeightSender([address], door=door, bucket_bytes=bucket_bytes) as sender:
        for version in range(1, _WARM_UP + repeats + 1):
            timings.copied_by_all.append(_copy_seconds(weights, copies, torch.get_num_threads()))
            timings.copied.append(_copy_seconds(weights, copies, 1))
            began_s = time.perf_counter()
            sender.publish(version, FINGERPRINT, _makers(weights))
            timings.sent.append(time.perf_counter() - began_s)
    return _Timings(
        sent=timings.sent[_WARM_UP:],
        copied=timings.copied[_WARM_UP:],
        copied_by_all=timings.copied_by_all[_WARM_UP:],
    )


def _copy_seconds(weights: Mapping[str, Tensor], copies: Mapping[str, Tensor], threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    began_s = time.perf_counter()
    for name, tensor in weights.items():
        copies[name].copy_(tensor)
    took_s = time.perf_counter() - began_s
    torch.set_num_threads(before)
    return took_s


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="updates measured inline; faster doors get more")
    parser.add_argument("--bucket-mib", type=int, default=MAX_BUCKET_BYTES // 2**20, help="size of a bucket")
    options = parser.parse_args()
    weights = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in _shapes().items()}
    size_bytes = sum(tensor.nbytes for tensor in weights.values())
    bucket_bytes, few = options.bucket_mib * 2**20, options.repeats
    with tempfile.TemporaryDirectory() as folder:
        timings = {
            door: _time_door(door, weights, Path(folder), repeats=repeats, bucket_bytes=bucket_bytes)
            for door, repeats in (("shm", few * 4), ("collective", few * 2), ("inline", few))
        }
    median = statistics.median
    parameters = sum(tensor.numel() for tensor in weights.values())
    say(f"{parameters / 1e6:.0f} million parameters in {len(weights)} tensors, {size_bytes / 1e9:.2f} GB; medians:")
    table(
        ["door", "update", "GB/s", "of one copy_", "of a copy_ by all threads"],
        [
            [
                door,
                f"{median(t.sent):.3f} s",
                f"{size_bytes / median(t.sent) / 1e9:.2f}",
                f"{median(t.copied) / median(t.sent):.2f}",
                f"{median(t.copied_by_all) / median(t.sent):.2f}",
            ]
            for door, t in timings.items()
        ],
    )
    shm, collective, inline = timings["shm"], timings["collective"], timings["inline"]
    finish(
        "weight_sync",
        {
            "parameters": parameters,
            "bytes": size_bytes,
            "shm_s": round(median(shm.sent), 4),
            "shm_gb_per_s": round(size_bytes / median(shm.sent) / 1e9, 2),
            "shm_fraction_of_copy": round(median(shm.copied) / median(shm.sent), 3),
            "shm_fraction_of_copy_by_all_threads": round(median(shm.copied_by_all) / median(shm.sent), 3),
            "collective_gb_per_s": round(size_bytes / median(collective.sent) / 1e9, 2),
            "collective_fraction_of_copy": round(median(collective.copied) / median(collective.sent), 3),
            "inline_gb_per_s": round(size_bytes / median(inline.sent) / 1e9, 2),
            "copy_gb_per_s": round(size_bytes / median(shm.copied) / 1e9, 2),
            "copy_by_all_threads_gb_per_s": round(size_bytes / median(shm.copied_by_all) / 1e9, 2),
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    main()
