"""Whole jobs on one GPU through the real servers: off-policy, and on-policy with weights pushed back.

A teacher of Qwen3-1.7B's shape and a student of Qwen3-0.6B's, with random weights, which cost what others cost. Teacher
server, rollout server and trainer are processes of their own and share the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end_inputs import MAX_TOKENS, Inputs, Shape, prepare
from benchmarks.gpu.scale import Scale
from benchmarks.measure import say, server

_TEACHER = Shape(hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, head_size=128)
_STUDENT = Shape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_size=128)
_TINY = Shape(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_size=8)
_NEEDED = (
    *("pydantic", "fastapi", "uvicorn", "grpc_health", "grpc_reflection", "prometheus_client", "click", "rich"),
    *("jinja2", "PIL", "xxhash"),
)
_WARM_UP_STEPS = 3
_LIMIT_S = 120.0  # of one trainer
_SEQUENCES = 32


def measure(scale: Scale) -> dict[str, object]:
    """Of each job: tokens per second, milliseconds of a step's phases, and whether the loss fell."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        return {"not run": f"the services need {', '.join(missing)}"}
    is_tiny = scale.device.type == "cpu"
    # In memory: how fast a disk takes checkpoints is not what is measured.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        folder = Path(scratch)
        inputs = prepare(
            folder,
            num_chats=24 * _SEQUENCES,
            teacher=_TINY if is_tiny else _TEACHER,
            student=_TINY if is_tiny else _STUDENT,
            vocabulary_size=scale.vocabulary,
            dtype=torch.float32 if is_tiny else torch.bfloat16,
            device=str(scale.device),
        )
        figures: dict[str, object] = {}
        with _service("kdmesh_teacher", folder, _teacher(inputs)) as teacher:
            config = _trainer(inputs, folder / "off_policy", teacher, is_tiny=is_tiny, steps=5 if is_tiny else 24)
            figures["off-policy"] = _run(folder, config)
            if not is_tiny:
                compiled = config | {
                    "output": str(folder / "compiled"),
                    "student": config["student"] | {"compile": "layers"},
                }
                figures["off-policy, compiled layers"] = _run(folder, compiled)
            with _service("kdmesh_rollout", folder, _rollout(inputs)) as rollout:
                config = _trainer(inputs, folder / "on_policy", teacher, is_tiny=is_tiny, steps=5 if is_tiny else 6)
                figures["on-policy"] = _run(folder, config | {"source": _on_policy(rollout, is_tiny=is_tiny)})
        return figures


def _service(module: str, folder: Path, config: Mapping[str, object]) -> contextlib.AbstractContextManager[str]:
    """Its address, while it runs."""
    ready = folder / f"{module}.json"
    command = [sys.executable, "-m", module, str(_written(folder / f"{module}.yaml", config)), "--ready-file"]
    return server([*command, str(ready)], ready, env=_environment())


def _run(folder: Path, config: Mapping[str, Any]) -> dict[str, object]:
    began_s = time.monotonic()
    path = _written(folder / "trainer.yaml", config)
    log = folder / "trainer.log"
    with log.open("w", encoding="utf-8") as output:
        trainer = subprocess.Popen(
            [sys.executable, "-m", "kdmesh_trainer", str(path)],
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = trainer.wait(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            trainer.kill()
            trainer.wait()
            code = None
    said = log.read_text(encoding="utf-8")
    say(said[-6000:])
    if code != 0:
        return {"failed": f"stopped after {_LIMIT_S:.0f} s" if code is None else said[-1500:]}
    lines = [json.loads(line) for line in (Path(config["output"]) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    counted = steps[_WARM_UP_STEPS:]
    seconds = sum(step["step_s"] for step in counted)
    phases = {name: statistics.median(step["phase_s"][name] for step in counted) for name in counted[0]["phase_s"]}
    return {
        "tokens_per_s": round(sum(step["num_tokens"] for step in counted) / seconds),
        "tokens of a step": round(statistics.mean(step["num_tokens"] for step in counted)),
        "step (ms)": round(statistics.median(step["step_s"] for step in counted) * 1e3, 1),
        "phases (ms)": {name: round(took_s * 1e3, 1) for name, took_s in phases.items()},
        "bounded by": counted[-1]["bounded_by"],
        "door": counted[-1]["door"],
        "first and last loss": [float(f"{step['loss_nats_per_token']:.5g}") for step in (steps[0], steps[-1])],
        "seconds with its start": round(time.monotonic() - began_s, 1),
    }


def _written(path: Path, config: Mapping[str, object]) -> Path:
    path.write_text(json.dumps(config), encoding="utf-8")  # which is YAML as well
    return path


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    folders = [root, *(root / "services" / name for name in ("teacher_server", "rollout_server", "trainer"))]
    others = os.environ.get("PYTHONPATH")
    whole = {**os.environ, "TRITON_INTERPRET": "0"}  # of a dry run: at these sizes an interpreter takes hours
    return {**whole, "PYTHONPATH": os.pathsep.join([*map(str, folders), *([others] if others else [])])}


def _teacher(inputs: Inputs) -> dict[str, object]:
    return {
        "engine": {"kind": "transformers", "model": str(inputs.teacher)},
        "server": {"port": 0, "rest_port": 0},
        "slab": {"slots": 8, "slots_per_session": 8, "slot_mib": 64},
    }


def _rollout(inputs: Inputs) -> dict[str, object]:
    return {
        "engine": {
            "kind": "transformers",
            "model": str(inputs.student),
            "max_sequence_tokens": MAX_TOKENS,
            "max_running": _SEQUENCES,
        },
        "server": {"port": 0, "rest_port": 0},
    }


def _trainer(inputs: Inputs, output: Path, teacher: str, *, is_tiny: bool, steps: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "student": {"model": str(inputs.student), "compute_dtype": "float32" if is_tiny else "bfloat16"},
        "teacher": {"addresses": [teacher], "prefetch": 4},
        "data": {"train": {"format": "chat", "path": str(inputs.chats)}, "max_tokens": MAX_TOKENS},
        "batch": {"sequences": _SEQUENCES, "max_tokens": 8192},
        "optimizer": {"learning_rate": 1e-4},
        "steps": steps,
        "objective": {"name": "distill"},
        "trackers": [],
    }


def _on_policy(rollout: str, *, is_tiny: bool) -> dict[str, object]:
    return {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollout]},
        "samples_per_prompt": 4,
        "sampling": {"max_new_tokens": 8 if is_tiny else 128},
    }
