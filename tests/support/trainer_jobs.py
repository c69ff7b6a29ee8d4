"""Whole training jobs on this machine: a teacher server, ranks, and what they leave on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.copies import Copy, serving
from tests.support.teacher_process import await_ready
from tests.support.trainer_ranks import Outcome, finish, start_trainers

_WORDS = ("the", "quick", "brown fox", "jumps", "over", "lazy", "dog and", "returns", "a value", "when", "it is asked")


def write_chats(path: Path, count: int, *, seed: int) -> Path:
    """A JSONL file of `count` short chats."""
    words = random.Random(seed)
    lines = []
    for _ in range(count):
        question, answer = (" ".join(words.choices(_WORDS, k=words.randint(1, most))) for most in (8, 12))
        lines.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def write_questions(path: Path, count: int, *, seed: int) -> Path:
    """A JSONL file of `count` short questions, each with a word for an answer."""
    words = random.Random(seed)
    rows = [{"question": " ".join(words.choices(_WORDS, k=4)), "answer": words.choice(_WORDS)} for _ in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def write_config(directory: Path, *, student: Path, teacher: str | None, steps: int, **sections: Any) -> Path:
    """A small job in `directory`; its output is `directory`/run. `sections` replace whole sections."""
    tree: dict[str, Any] = {
        "output": str(directory / "run"),
        "student": {"model": str(student), "device": "cpu"},
        "data": {
            "train": {"format": "chat", "path": str(write_chats(directory / "train.jsonl", 30, seed=1))},
            "held_out": {"format": "chat", "path": str(write_chats(directory / "held_out.jsonl", 5, seed=2))},
            "max_tokens": 128,
        },
        "batch": {"sequences": 4, "max_tokens": 192},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "steps": steps,
        "trackers": [],
        **({} if teacher is None else {"teacher": {"addresses": [teacher], "prefetch": 2}}),
    }
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(tree | sections), encoding="utf-8")
    return path


@contextmanager
def started_job(config: Path, *overrides: str, ranks: int) -> Iterator[list[Copy]]:
    """The ranks of a job, killed on exit if they still run."""
    sets = [argument for override in overrides for argument in ("--set", override)]
    processes = start_trainers(str(config), *sets, ranks=ranks)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        finish(process for process in processes if not process.stderr.closed)


def run_job(config: Path, *overrides: str, ranks: int = 1) -> list[Outcome]:
    """How every rank of a job ended."""
    with started_job(config, *overrides, ranks=ranks) as processes:
        return finish(processes)


def run_whole_and_in_parts(directory: Path, *, student: Path, teacher: Path) -> Path:
    """The output of a job of two ranks, which has the losses of one that was stopped and went on."""
    configs = []
    with serving_teacher(directory, teacher) as address:
        for name in ("whole", "parts"):
            (directory / name).mkdir()
            configs.append(
                write_config(directory / name, student=student, teacher=address, steps=4, checkpoint={"every": 2})
            )
        whole, parts = configs
        for config, *overrides in ((whole,), (parts, "steps=2"), (parts,)):
            for outcome in run_job(config, *overrides, ranks=2):
                assert outcome.exit_code == 0, outcome.errors
    run = directory / "whole" / "run"
    assert losses(directory / "parts" / "run") == losses(run)
    return run


def check_answers_can_be_learnt(answers: Path, directory: Path, *, student: Path, steps: int) -> None:
    """A student that trains on generated answers predicts them better."""
    written = {"format": "chat", "path": str(answers)}
    job = write_config(
        directory,
        student=student,
        teacher=None,
        steps=steps,
        objective={"name": "sft"},
        data={"train": written, "held_out": written, "max_tokens": 128, "unusable": "drop"},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        batch={"sequences": 8, "max_tokens": 512},
    )
    (outcome,) = run_job(job)
    assert outcome.exit_code == 0, outcome.errors
    before, after = (scores["cross_entropy_nats_per_token"] for scores in evaluations(directory / "run").values())
    assert after < 0.8 * before


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """What a run's record has of a kind, as step or evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Loss by step, of a run's record."""
    steps = records(run, "step")
    by_step = {line["step"]: line["loss_nats_per_token"] for line in steps}
    assert len(by_step) == len(steps), "a step is recorded twice"
    return by_step


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """Scores by the number of steps done, of a run's record."""
    return {line["step"]: line for line in records(run, "evaluation")}


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints; fails when anything else lies beside them."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


@contextmanager
def serving_teacher(directory: Path, model: Path, **engine: Any) -> Iterator[str]:
    """The host:port of a deterministic teacher server in a process of its own, which ends with the context.

    Args:
        engine: further keys of that section.
    """
    config = directory / "teacher.yaml"
    own = {"kind": "transformers", "model": str(model), "deterministic": True, "device": "cpu", "threads": 1}
    tree = {
        "engine": {**own, **engine},
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
        "slab": {"slots": 8, "slot_mib": 0.25, "slots_per_session": 4},
    }
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with serving("kdmesh_teacher", config) as process:
        yield await_ready(process).grpc


@contextmanager
def serving_rollouts(directory: Path, student: Path) -> Iterator[str]:
    """The host:port of a rollout server in a process of its own, which ends with the context."""
    config = directory / "rollout.yaml"
    engine = {"kind": "transformers", "model": str(student), "device": "cpu", "deterministic": True}
    config.write_text(yaml.safe_dump({"engine": engine, "server": {"port": 0, "rest_port": 0}}), encoding="utf-8")
    with serving("kdmesh_rollout", config) as process:
        yield await_ready(process).grpc
