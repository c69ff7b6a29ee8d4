"""Off-policy distillation through the services against TRL's GKDTrainer, on the same models, data and machine.

TRL lives in an environment of its own, made on the first run below the benchmark's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from benchmarks.end_to_end_arithmetic import Arithmetic, measure
from benchmarks.end_to_end_inputs import MAX_TOKENS, SEQUENCES_PER_STEP, Inputs, prepare
from benchmarks.measure import finish, say, server, table
from kdmesh_trainer.config import TrainerConfig

_WARM_UP_STEPS = 2


def run_trl(folder: Path, *, num_chats: int, steps: int) -> float:
    """Tokens (not padding) per second of TRL's steps after the first."""
    python = folder / "trl" / "bin" / "python"
    if not python.exists():
        say("making TRL's environment ...")
        venv.create(folder / "trl", with_pip=True)
        for package in ("torch==2.13.0", "trl==1.16.*"):  # torch first, so that no CUDA build is pulled
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    done = subprocess.run(
        [python, "-m", "benchmarks.end_to_end_trl", folder, str(num_chats), str(steps)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return float(result["tokens"] / result["seconds"])


def run_kdmesh(inputs: Inputs, *, steps: int, threads: int) -> tuple[float, float]:
    """Tokens per second, and the fraction of time that the trainer waited for the teacher."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ready, teacher, trainer = folder / "ready.json", folder / "teacher.yaml", folder / "trainer.yaml"
        teacher.write_text(yaml.safe_dump(_teacher_config(inputs)), encoding="utf-8")
        limits = {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "kdmesh_teacher", str(teacher), "--ready-file", str(ready)]
        with server(command, ready, env=limits) as address:
            config = _trainer_config(inputs, folder / "run", address, steps)
            TrainerConfig.model_validate(config)
            trainer.write_text(yaml.safe_dump(config), encoding="utf-8")
            subprocess.run(
                [sys.executable, "-m", "kdmesh_trainer", str(trainer)], check=True, env={**os.environ, **limits}
            )
        return _rates(folder / "run" / "metrics.jsonl")


def _rates(path: Path) -> tuple[float, float]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps: list[Mapping[str, float]] = [line for line in lines if line["kind"] == "step"][_WARM_UP_STEPS:]
    seconds = sum(step["step_s"] for step in steps)
    waited = sum(step["teacher_wait_s"] for step in steps)
    return sum(step["num_tokens"] for step in steps) / seconds, waited / seconds


def _teacher_config(inputs: Inputs) -> dict[str, object]:
    return {
        "engine": {"kind": "transformers", "model": str(inputs.teacher.resolve())},
        "server": {"port": 0, "rest_port": 0},
        "slab": {"slots": 8, "slots_per_session": 8, "slot_mib": 16},
    }


def _trainer_config(inputs: Inputs, output: Path, address: str, steps: int) -> dict[str, object]:
    return {
        "output": str(output),
        "student": {"model": str(inputs.student.resolve())},
        "teacher": {"addresses": [address], "prefetch": 4},
        "data": {"train": {"format": "chat", "path": str(inputs.chats.resolve())}, "max_tokens": MAX_TOKENS},
        "batch": {"sequences": SEQUENCES_PER_STEP, "max_tokens": 2048},
        "optimizer": {"learning_rate": 1e-4},
        "steps": steps,
        "objective": {"name": "distill"},
        "trackers": [],
    }


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24, help="steps of kdmesh; TRL does a quarter of them")
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="of each kdmesh process"
    )
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-end-to-end"))
    arguments = parser.parse_args()
    num_chats = arguments.steps * SEQUENCES_PER_STEP
    inputs = prepare(arguments.folder, num_chats=num_chats)
    arithmetic: list[Arithmetic] = [measure(inputs)]
    trl = run_trl(arguments.folder, num_chats=num_chats, steps=max(4, arguments.steps // 4))
    kdmesh, waited = run_kdmesh(inputs, steps=arguments.steps, threads=arguments.threads)
    arithmetic.append(measure(inputs))  # before and after: the machine's speed may drift
    bare = statistics.mean(a.tokens_per_s for a in arithmetic)
    gemm = statistics.mean(a.gemm_flop_per_s for a in arithmetic)
    flop = arithmetic[0].flop_per_token
    table(
        ["", "tokens/s", "against TRL", "of the machine's fp32 GEMM rate"],
        [
            [name, f"{rate:.0f}", f"{rate / trl:.2f}", f"{rate * flop / gemm:.1%}"]
            for name, rate in (
                ("TRL 1.16 GKDTrainer, lmbda 0", trl),
                ("bare arithmetic, one process, sequence by sequence", bare),
                ("kdmesh, teacher server and one rank", kdmesh),
            )
        ],
    )
    say(f"{flop / 1e6:.0f} MFLOP per token; GEMM {gemm / 1e9:.0f} GFLOP/s; {torch.get_num_threads()} threads")
    say(f"kdmesh waited for its teacher {waited:.0%} of the time")
    finish(
        "end_to_end",
        {
            "tokens_per_second": round(kdmesh, 1),
            "trl_tokens_per_second": round(trl, 1),
            "bare_tokens_per_second": round(bare, 1),
            "ratio_to_trl": round(kdmesh / trl, 2),
            "ratio_to_bare": round(kdmesh / bare, 2),
            "gemm_fraction": round(kdmesh * flop / gemm, 3),
            "teacher_wait_fraction": round(waited, 3),
            "seconds": round(time.process_time(), 1),
        },
    )


if __name__ == "__main__":
    main()
