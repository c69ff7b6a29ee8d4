"""What each divergence makes of one student in the same number of steps: its distance to the teacher on held-out text.

The teacher, the student and the text are the demo's. All students see the same batches; a seed is another start and
another order. Divergences that learn from samples alone are not here: `make demo-onpolicy` shows one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import finish, say, table
from kdmesh.demo import plan as plans
from kdmesh.demo.plan import BRIEF, STANDARD, Plan
from kdmesh.demo.record import Evaluation, read_record
from kdmesh.demo.stage import Stage, opened
from kdmesh.demo.workspace import METRICS, is_finished
from kdmesh.launch import jobs


def _distil(divergence: str, **params: Any) -> dict[str, Any]:
    return {"name": "distill", "divergence": {"name": divergence, **params}}


METHODS: Mapping[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "forward KL": _distil("forward_kl"),
    "forward KL, temperature 2": {**_distil("forward_kl"), "temperature": 2.0},
    "half forward KL, half SFT": {**_distil("forward_kl"), "kd_weight": 0.5, "ce_weight": 0.5},
    "forward KL, top 32 and the rest": {**_distil("forward_kl"), "keep": {"top_k": 32}},
    "reverse KL": _distil("reverse_kl"),
    "Jensen-Shannon, 0.5": _distil("jensen_shannon"),
    "skewed KL, 0.1": _distil("skewed_kl"),
    "skewed reverse KL, 0.1": _distil("skewed_reverse_kl"),
    "adaptive KL": _distil("adaptive_kl"),
    "total variation": _distil("total_variation"),
    "Renyi, order 0.5": _distil("renyi", order=0.5),
    "alpha-beta, (0.2, 0.7)": _distil("alpha_beta"),
    "entropy-gated KL": _distil("entropy_gated_kl"),
    "masked reverse KL": _distil("masked_reverse_kl"),
    "top-1 cross-entropy": _distil("top1_cross_entropy"),
    "hierarchical ranking, top 5": _distil("hierarchical_ranking"),
    "dual-space KD (DSKD)": {**_distil("forward_kl"), "algorithm": {"name": "dskd"}},
    "DSKD, both projectors trained": {
        **_distil("forward_kl"),
        "algorithm": {"name": "dskd", "student_projector": "trained"},
    },
    "half DSKD, half SFT": {
        **_distil("forward_kl"),
        "algorithm": {"name": "dskd"},
        "kd_weight": 0.5,
        "ce_weight": 0.5,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one method: a value for each seed."""

    kl: list[float]
    perplexity: list[float]
    agreement: list[float]


def _train(stage: Stage, name: str, objective: dict[str, Any], seed: int, overrides: list[str]) -> Evaluation:
    """The last evaluation; a run that an earlier call has finished is not made again."""
    workspace = stage.workspace
    run = workspace.run(f"{_file_name(name)}-{seed}")
    plan = replace(stage.plan, seed=seed)
    if not is_finished(run, steps=plan.student_training.steps):
        tree = plans.student_training(
            plan, corpus=workspace.corpus, start=workspace.student_start, output=run, objective=objective
        )
        path = workspace.write_config(run.name, {**tree, "ranks": 1})  # several would learn the same
        stage.train(f"{name}, seed {seed}", path, run, overrides)
    last = read_record(run / METRICS).evaluations[-1]
    assert last.kl_nats_per_token is not None
    assert last.top1_agreement is not None
    say(f"{name}, seed {seed}: {last.kl_nats_per_token:.4f} nats from the teacher, perplexity {last.perplexity:.1f}")
    return last


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _measure(plan: Plan, methods: Mapping[str, dict[str, Any]], *, seeds: int, output: Path) -> dict[str, Result]:
    results = {name: Result(kl=[], perplexity=[], agreement=[]) for name in methods}
    with opened(plan, output=output, cache=Path(".cache"), fresh=False) as stage:
        stage.train_teacher()
        server = plans.teacher_server(plan, model=stage.workspace.teacher_model)
        overrides = jobs.served(jobs.TEACHER, stage.serve(jobs.TEACHER, server))
        for seed in range(1, seeds + 1):
            for name, objective in methods.items():
                last = _train(stage, name, objective, seed, overrides)
                results[name].kl.append(last.kl_nats_per_token or 0.0)
                results[name].perplexity.append(last.perplexity)
                results[name].agreement.append(last.top1_agreement or 0.0)
    return results


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and how far the furthest is from it."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {max(abs(value - mean) for value in values):.{digits}f}"


def main(arguments: Sequence[str]) -> None:
    """Print the table, nearest to the teacher first, and the JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of each student  [default: 120]")
    parser.add_argument("--seeds", type=int, default=2, help="students of each method  [default: 2]")
    parser.add_argument("--only", action="append", choices=METHODS, help="a method; may be given several times")
    parser.add_argument("--output", type=Path, help="keeps finished students  [default: runs/quality-STEPS]")
    parser.add_argument("--brief", action="store_true", help="models too small to learn: does it run at all?")
    options = parser.parse_args(arguments)
    standard = BRIEF if options.brief else STANDARD
    training = replace(standard.student_training, steps=options.steps, evaluate_every=options.steps)
    methods = {name: METHODS[name] for name in options.only or METHODS}
    output = options.output or Path(f"runs/quality-{options.steps}")
    results = _measure(replace(standard, student_training=training), methods, seeds=options.seeds, output=output)
    nearest = sorted(results, key=lambda name: statistics.fmean(results[name].kl))
    say(f"\nAfter {options.steps} steps, mean of {options.seeds} seeds ± the furthest from it, on held-out text:")
    table(
        ["trained by", "KL(teacher, student), nats", "perplexity", "same first choice"],
        [
            [
                name,
                _spread(results[name].kl, 4),
                _spread(results[name].perplexity, 1),
                _spread(results[name].agreement, 3),
            ]
            for name in nearest
        ],
    )
    means = {name: round(statistics.fmean(results[name].kl), 5) for name in nearest}
    finish("quality", {"steps": options.steps, "seeds": options.seeds, "kl_nats_per_token": means})


if __name__ == "__main__":
    main(sys.argv[1:])
