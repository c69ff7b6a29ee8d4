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
class Sampled:
    """Training on the student's own answers."""

    training: Training
    prompts: int  # of a step
    samples_per_prompt: int
    max_new_tokens: int
    max_staleness: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole demo."""

    corpus: Sizes
    vocabulary_size: int
    teacher: Architecture
    student: Architecture
    teacher_training: Training
    student_training: Training
    student_warm_up: Training  # on the docstrings, before it samples
    student_on_policy: Sampled
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
    student_warm_up=Training(steps=120, learning_rate=3e-3, warmup_steps=20, evaluate_every=120),
    student_on_policy=Sampled(
        training=Training(steps=120, learning_rate=2e-3, warmup_steps=5, evaluate_every=12),
        prompts=8,
        samples_per_prompt=2,
        max_new_tokens=64,
        max_staleness=1,
    ),
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
    student_warm_up=Training(steps=4, learning_rate=1e-2, warmup_steps=1, evaluate_every=4),
    student_on_policy=Sampled(
        training=Training(steps=8, learning_rate=1e-2, warmup_steps=1, evaluate_every=4),
        prompts=4,
        samples_per_prompt=2,
        max_new_tokens=16,
        max_staleness=1,
    ),
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


def warm_up(plan: Plan, *, corpus: Path, start: Path, output: Path) -> dict[str, Any]:
    """The trainer's configuration for a student that has seen some docstrings, so that its samples are something."""
    return _trainer(plan, plan.student_warm_up, corpus=corpus, start=start, output=output, objective={"name": "sft"})


def on_policy(plan: Plan, *, corpus: Path, start: Path, output: Path) -> dict[str, Any]:
    """The trainer's configuration for a student that learns from its own samples."""
    sampled = plan.student_on_policy
    tree = _trainer(
        plan,
        sampled.training,
        corpus=corpus,
        start=start,
        output=output,
        objective={"name": "distill", "divergence": {"name": "reverse_kl"}},
    )
    return {
        **tree,
        "student": {"model": str(start), "device": "cpu"},
        "teacher": {"addresses": [], "prefetch": 4},
        "source": {
            "kind": "on_policy",
            "rollouts": {"addresses": []},
            "samples_per_prompt": sampled.samples_per_prompt,
            "sampling": {"max_new_tokens": sampled.max_new_tokens},
            "max_staleness": sampled.max_staleness,
        },
        "batch": {**tree["batch"], "sequences": sampled.prompts * sampled.samples_per_prompt},
        "ranks": 1,
    }


def rollout_server(plan: Plan, *, model: Path) -> dict[str, Any]:
    """The rollout server's configuration; its ports are any free ones."""
    return {
        "engine": {
            "kind": "transformers",
            "model": str(model),
            "dtype": "float32",
            "device": "cpu",
            "max_sequence_tokens": plan.max_tokens,
        },
        "server": {"port": 0, "rest_port": 0, "drain_s": 5},
    }


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
