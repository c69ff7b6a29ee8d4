"""What usual recipes do to a small student: its curve on held-out text, as a table and as pictures.

Teacher, student and text are the demo's. Recipes of one picture have the same start, the same number of steps and
batches of the same size. Those of a student with another tokenizer are the runs of quality_tokenizers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import finish, say, table
from benchmarks.quality_tokenizers import METHODS, run_name
from benchmarks.recipe_charts import Line, draw
from kdmesh.demo import plan as plans
from kdmesh.demo.on_policy import warm_up
from kdmesh.demo.plan import BRIEF, STANDARD
from kdmesh.demo.record import Evaluation, read_record
from kdmesh.demo.stage import Stage, opened
from kdmesh.demo.workspace import METRICS, WARM_UP, is_finished
from kdmesh.launch import jobs

_EVALUATIONS = 6


def _distil(divergence: str, **more: Any) -> dict[str, Any]:
    return {"name": "distill", "divergence": {"name": divergence}, **more}


_FORWARD = _distil("forward_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One student, beside what its picture says of all."""

    objective: Mapping[str, Any]
    learning_rate: float | None = None  # None: the picture's
    student: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None  # of on-policy, beside rollouts and sampling
    follows: Mapping[str, Any] | None = None  # teacher.follows_student
    has_context: bool = False  # the teacher reads what the student does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Recipes that are shown together."""

    title: str
    figure: str  # of Evaluation
    recipes: Mapping[str, Recipe]
    starts_warm: bool = True  # from a student that has been fine-tuned; else from random weights
    is_short: bool = False  # its chats have the function's first line alone


PICTURES: Mapping[str, Picture] = {
    "off-policy": Picture(
        title="From random weights, on the data's answers",
        figure="kl_nats_per_token",
        starts_warm=False,
        recipes={
            "SFT": Recipe(objective={"name": "sft"}),
            "forward KL": Recipe(objective=_FORWARD),
            "half of each": Recipe(objective={**_FORWARD, "kd_weight": 0.5, "ce_weight": 0.5}),
            "skewed KL, 0.1": Recipe(objective=_distil("skewed_kl")),
            "DSKD and SFT": Recipe(
                objective={**_FORWARD, "algorithm": {"name": "dskd"}, "kd_weight": 0.5, "ce_weight": 0.5}
            ),
        },
    ),
    "after-sft": Picture(
        title="After SFT",
        figure="kl_nats_per_token",
        recipes={
            "more SFT": Recipe(objective={"name": "sft"}),
            "forward KL, the data's answers": Recipe(objective=_FORWARD),
            "reverse KL, own samples": Recipe(objective=_distil("reverse_kl"), source={}),
            "GKD: half own samples, JSD": Recipe(objective=_distil("jensen_shannon"), source={"sampled_fraction": 0.5}),
            "LoRA, forward KL": Recipe(
                objective=_FORWARD, learning_rate=1e-2, student={"lora": {"rank": 16, "alpha": 32}}
            ),
        },
    ),
    "context": Picture(
        title="The student reads the first line, the teacher the whole function",
        figure="kl_nats_per_token",
        is_short=True,
        recipes={
            # Not `sft`, which has no teacher to give a context to; the divergence is then only measured.
            "SFT without it": Recipe(objective={**_FORWARD, "kd_weight": 0.0, "ce_weight": 1.0}, has_context=True),
            "context distillation": Recipe(objective=_FORWARD, has_context=True),
        },
    ),
    "self": Picture(
        title="After SFT, without another model",
        figure="perplexity",
        recipes={
            "more SFT": Recipe(objective={"name": "sft"}),
            "SFT and its own average": Recipe(
                objective={**_FORWARD, "kd_weight": 1.0, "ce_weight": 1.0}, follows={"every": 1, "decay": 0.95}
            ),
        },
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Run what is not there yet; print a table for each picture, and the JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of each student  [default: 60]")
    parser.add_argument("--only", action="append", choices=PICTURES, help="a picture; may be given several times")
    parser.add_argument("--output", type=Path, help="keeps finished students  [default: runs/recipes-STEPS]")
    parser.add_argument("--tokenizers", type=Path, help="what quality_tokenizers has kept; a picture of it too")
    parser.add_argument("--draw", type=Path, help="folder for the pictures")
    parser.add_argument("--brief", action="store_true", help="models too small to learn: does it run at all?")
    options = parser.parse_args(arguments)
    output = options.output or Path(f"runs/recipes-{options.steps}")
    found: dict[str, Mapping[str, Sequence[Evaluation]]] = {}
    with opened(BRIEF if options.brief else STANDARD, output=output, cache=Path(".cache"), fresh=False) as stage:
        kitchen = _Kitchen(stage, steps=options.steps)
        for name in options.only or PICTURES:
            found[name] = {title: kitchen.curve(name, title) for title in PICTURES[name].recipes}
    pictures = dict(PICTURES)
    if options.tokenizers is not None:
        pictures["tokenizers"], found["tokenizers"] = _of_tokenizers(options.tokenizers)
    for name, curves in found.items():
        _show(pictures[name], curves)
        if options.draw is not None:
            options.draw.mkdir(parents=True, exist_ok=True)
            (options.draw / f"{name}.svg").write_text(_drawn(name, pictures[name], curves), encoding="utf-8")
    finish("recipes", {"steps": options.steps, "last": _lasts(pictures, found)})


class _Kitchen:
    """Trains one student after the other; what has the same title in two pictures is the same student."""

    def __init__(self, stage: Stage, *, steps: int) -> None:
        self._stage = stage
        self._steps = steps
        self._teacher = ""  # its address, once it is needed
        self._num_servers = 0

    def curve(self, picture_name: str, title: str) -> Sequence[Evaluation]:
        """Its evaluations; a run that an earlier call has finished is not made again."""
        workspace, picture = self._stage.workspace, PICTURES[picture_name]
        recipe = picture.recipes[title]
        run = workspace.run("".join(letter if letter.isalnum() else "-" for letter in title))
        if not is_finished(run, steps=self._steps):
            tree = self._tree(picture, recipe, run)
            overrides = [*self._teacher_of(recipe), *self._rollouts_of(recipe)]
            self._stage.train(title, workspace.write_config(run.name, tree), run, overrides)
        evaluations = read_record(run / METRICS).evaluations
        say(f"{picture_name}, {title}: {getattr(evaluations[-1], picture.figure):.4f}")
        return evaluations

    def _tree(self, picture: Picture, recipe: Recipe, run: Path) -> dict[str, Any]:
        plan, workspace = self._stage.plan, self._stage.workspace
        base = plan.student_on_policy.training if picture.starts_warm else plan.student_training
        training = replace(
            base,
            steps=self._steps,
            learning_rate=recipe.learning_rate or base.learning_rate,
            warmup_steps=min(base.warmup_steps, self._steps - 1),
            evaluate_every=max(1, self._steps // _EVALUATIONS),
        )
        tree = plans.student_training(
            replace(plan, student_training=training),
            corpus=_short(workspace.corpus, workspace.output / "short") if picture.is_short else workspace.corpus,
            start=workspace.student_start,
            output=run,
            objective=dict(recipe.objective),
        )
        tree["ranks"] = 1  # several would learn the same
        if picture.starts_warm:
            tree["student"] = {"model": str(self._warm()), "device": "cpu", **recipe.student}
        if recipe.has_context:
            tree["data"] |= {"teacher_context": {"kind": "messages"}}
        if recipe.follows is not None:
            tree["teacher"] |= {"follows_student": dict(recipe.follows)}
        if recipe.source is not None:
            sampled = plan.student_on_policy
            tree["source"] = {
                "kind": "on_policy",
                "samples_per_prompt": sampled.samples_per_prompt,
                "sampling": {"max_new_tokens": sampled.max_new_tokens},
                "max_staleness": sampled.max_staleness,
                **recipe.source,
            }
        return tree

    def _warm(self) -> Path:
        warm_up(self._stage)
        return self._stage.workspace.run(WARM_UP) / "final"

    def _teacher_of(self, recipe: Recipe) -> list[str]:
        if recipe.follows is not None:
            mirror = plans.teacher_server(self._stage.plan, model=self._warm())
            mirror["engine"] |= {"updatable": True}
            return jobs.served(jobs.TEACHER, self._stage.serve(self._another(jobs.TEACHER), mirror))
        if not self._teacher:
            self._stage.train_teacher()
            server = plans.teacher_server(self._stage.plan, model=self._stage.workspace.teacher_model)
            self._teacher = self._stage.serve(jobs.TEACHER, server)
        return jobs.served(jobs.TEACHER, self._teacher)

    def _rollouts_of(self, recipe: Recipe) -> list[str]:
        if recipe.source is None:
            return []
        server = plans.rollout_server(self._stage.plan, model=self._warm())
        return jobs.served(jobs.ROLLOUT, self._stage.serve(self._another(jobs.ROLLOUT), server))

    def _another(self, service: jobs.Service) -> jobs.Service:
        self._num_servers += 1
        return replace(service, name=f"{service.name}-{self._num_servers}")


def _short(corpus: Path, directory: Path) -> Path:
    """The corpus with the first line of each function; what the teacher reads of it is the whole one."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        lines = []
        for line in (corpus / name).read_text(encoding="utf-8").splitlines():
            asked, answer = json.loads(line)["messages"]
            request, _, source = asked["content"].partition("\n\n")
            first = {"role": "user", "content": f"{request}\n\n{source.splitlines()[0]}"}
            lines.append(json.dumps({"messages": [first, answer], "teacher_messages": [asked]}) + "\n")
        (directory / name).write_text("".join(lines), encoding="utf-8")
    return directory


def _of_tokenizers(kept: Path) -> tuple[Picture, Mapping[str, Sequence[Evaluation]]]:
    """The first seed of every method that was run."""
    curves = {
        name: read_record(kept / run_name(name, 1) / METRICS).evaluations
        for name in METHODS
        if (kept / run_name(name, 1) / METRICS).exists()
    }
    return Picture(title="Another tokenizer, over shared tokens", figure="kl_nats_per_token", recipes={}), curves


def _show(picture: Picture, curves: Mapping[str, Sequence[Evaluation]]) -> None:
    say(f"\n{picture.title}: {picture.figure}, after so many steps:")
    steps = sorted({evaluation.step for curve in curves.values() for evaluation in curve})
    rows = []
    for title, curve in curves.items():
        by_step = {evaluation.step: getattr(evaluation, picture.figure) for evaluation in curve}
        rows.append([title, *(f"{by_step[step]:.3f}" if step in by_step else "" for step in steps)])
    table(["", *map(str, steps)], rows)


def _drawn(name: str, picture: Picture, curves: Mapping[str, Sequence[Evaluation]]) -> str:
    labels = {"kl_nats_per_token": "KL(teacher, student), nats", "perplexity": "perplexity"}
    lines = [
        Line(label=title, x=[e.step for e in curve], y=[getattr(e, picture.figure) for e in curve])
        for title, curve in curves.items()
    ]
    return draw(name, lines, title=picture.title, y_label=labels[picture.figure])


def _lasts(
    pictures: Mapping[str, Picture], found: Mapping[str, Mapping[str, Sequence[Evaluation]]]
) -> Mapping[str, Mapping[str, float]]:
    return {
        name: {title: round(getattr(curve[-1], pictures[name].figure), 4) for title, curve in curves.items()}
        for name, curves in found.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
