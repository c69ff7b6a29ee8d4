"""How large everything in the demo is, and the configuration files that follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdmesh.demo.corpus import Sizes
from kdmesh.demo.models import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training run."""

    steps: int
    learning_rate: float
    warmup_steps: int
    evaluate_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole demo."""

    corpus: Sizes
    vocabulary_size: int
    teacher: Architecture
    student: Architecture
    teacher_training: Training
    student_training: Training
    max_tokens: int  # of a sequence
    batch_sequences: int
    micro_batch_tokens: int
    held_out_sequences: int
    ranks: int
    seed: int


# Sized for about four minutes on two cores.
STANDARD = Plan(
    corpus=Sizes(max_source=320, max_docstring=480, min_docstring=20),
    vocabulary_size=4096,
    teacher=Architecture(hidden_size=256, layers=4, heads=4, key_value_heads=2, intermediate_size=768),
    student=Architecture(hidden_size=128, layers=3, heads=4, key_value_heads=2, intermediate_size=384),
    teacher_training=Training(steps=320, learning_rate=2e-3, warmup_steps=20, evaluate_every=160),
    student_training=Training(steps=260, learning_rate=3e-3, warmup_steps=20, evaluate_every=26),
    max_tokens=384,
    batch_sequences=16,
    micro_batch_tokens=2048,
    held_out_sequences=96,
    ranks=2,
    seed=1,
)

# The same story in seconds, for tests: nothing is learnt that is worth telling.
BRIEF = Plan(
    corpus=Sizes(max_source=160, max_docstring=120, min_docstring=20),
    vocabulary_size=512,
    teacher=Architecture(hidden_size=32, layers=2, heads=2, key_value_heads=1, intermediate_size=64),
    student=Architecture(hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=32),
    teacher_training=Training(steps=8, learning_rate=1e-2, warmup_steps=1, evaluate_every=4),
    student_training=Training(steps=8, learning_rate=1e-2, warmup_steps=1, evaluate_every=4),
    max_tokens=192,
    batch_sequences=8,
    micro_batch_tokens=1024,
    held_out_sequences=16,
    ranks=2,
    seed=1,
)


def teacher_training(plan: Plan, *, corpus: Path, start: Path, output: Path) -> dict[str, Any]:
    """The trainer's configuration for making the teacher from scratch."""
    return _trainer(plan, plan.teacher_training, corpus=corpus, start=start, output=output, objective={"name": "sft"})


def student_training(
    plan: Plan, *, corpus: Path, start: Path, output: Path, objective: dict[str, Any]
) -> dict[str, Any]:
    """The trainer's configuration for one student. Whatever the objective, the teacher judges it."""
    tree = _trainer(plan, plan.student_training, corpus=corpus, start=start, output=output, objective=objective)
    return {**tree, "teacher": {"addresses": [], "prefetch": 4}}


def teacher_server(plan: Plan, *, model: Path) -> dict[str, Any]:
    """The teacher server's configuration; its ports are any free ones."""
    row_bytes = 4 * plan.teacher.hidden_size
    return {
        "engine": {"kind": "transformers", "model": str(model), "dtype": "float32", "device": "cpu"},
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
        # A slot holds the rows of a micro-batch if every token of it were asked for.
        "slab": {"slots": 16, "slot_mib": plan.micro_batch_tokens * row_bytes / 2**20},
    }


def _trainer(
    plan: Plan, training: Training, *, corpus: Path, start: Path, output: Path, objective: dict[str, Any]
) -> dict[str, Any]:
    return {
        "output": str(output),
        "student": {"model": str(start), "weights": "random", "device": "cpu"},
        "objective": objective,
        "data": {
            "train": {"format": "chat", "path": str(corpus / "train.jsonl")},
            "held_out": {"format": "chat", "path": str(corpus / "held_out.jsonl")},
            "max_tokens": plan.max_tokens,
        },
        "batch": {"sequences": plan.batch_sequences, "max_tokens": plan.micro_batch_tokens},
        "optimizer": {
            "learning_rate": training.learning_rate,
            "warmup_steps": training.warmup_steps,
            "weight_decay": 0.1,
        },
        "steps": training.steps,
        "evaluation": {"every": training.evaluate_every, "max_sequences": plan.held_out_sequences},
        "checkpoint": {"every": training.evaluate_every, "keep": 1},
        "seed": plan.seed,
        "ranks": plan.ranks,
    }
