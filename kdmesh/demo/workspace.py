"""The directories of the demo: what is cached for every later one, and what belongs to this run."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from kdmesh.demo.corpus import Corpus
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import read_record
from kdmesh.errors import ConfigError
from kdmesh.outputs import refused_directory

METRICS = "metrics.jsonl"
_PLAN = "plan.json"
_SECONDS = "seconds.json"
STUDENTS = ("sft", "kd")
WARM_UP, ON_POLICY = "warm-up", "on-policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where everything lies."""

    output: Path  # of this run
    cached: Path  # of the teacher, under a name that changes with everything it depends on

    @property
    def corpus(self) -> Path:
        """train.jsonl and held_out.jsonl."""
        return self.cached / "corpus"

    @property
    def teacher_run(self) -> Path:
        """Output of the teacher's training."""
        return self.cached / "run"

    @property
    def teacher_model(self) -> Path:
        """The trained teacher; it is there only when its training is complete."""
        return self.teacher_run / "final"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.output / "report.html"

    @property
    def teacher_start(self) -> Path:
        """The teacher's architecture and tokenizer, without weights."""
        return self.cached / "start"

    @property
    def student_start(self) -> Path:
        """The students' architecture and tokenizer, without weights."""
        return self.output / "student"

    def run(self, student: str) -> Path:
        """Output of one student's training."""
        return self.output / student

    def config(self, name: str) -> Path:
        """A configuration file that the demo wrote; it works with the ordinary commands too."""
        return self.output / f"{name}.yaml"

    def write_config(self, name: str, tree: dict[str, Any]) -> Path:
        """Write a configuration file."""
        path = self.config(name)
        text = yaml.safe_dump(tree, sort_keys=False)
        path.write_text(f"# Written by `kdmesh demo`; it can be used by itself too.\n{text}", encoding="utf-8")
        return path


def open_workspace(plan: Plan, corpus: Corpus, *, output: Path, cache: Path) -> Workspace:
    """Make the directories, and clear away students that another plan, teacher or corpus has made.

    Raises:
        ConfigError: `output` holds something that is not a demo's, or one of them cannot be written.
    """
    teacher = _digest(_teacher_part(plan), corpus)
    workspace = Workspace(output=output, cached=cache / f"demo-teacher-{teacher[:16]}")
    for directory in (output, workspace.cached):
        if (why := refused_directory(directory)) is not None:
            raise ConfigError(why)
    known = output / _PLAN
    if output.exists() and any(output.iterdir()) and not known.exists():
        raise ConfigError(f"{output} holds something else than a demo; give another --output")
    digest = _digest(asdict(plan), corpus)
    output.mkdir(parents=True, exist_ok=True)
    if known.exists() and json.loads(known.read_text(encoding="utf-8"))["digest"] != digest:
        clear_students(workspace)
    known.write_text(json.dumps({"digest": digest, **asdict(plan)}, indent=2) + "\n", encoding="utf-8")
    workspace.cached.mkdir(parents=True, exist_ok=True)
    return workspace


def add_seconds(run: Path, seconds: float) -> None:
    """Count time spent on a run, over all attempts."""
    run.mkdir(parents=True, exist_ok=True)
    (run / _SECONDS).write_text(json.dumps(read_seconds(run) + seconds), encoding="utf-8")


def read_seconds(run: Path) -> float:
    """Time spent on a run so far."""
    path = run / _SECONDS
    return float(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else 0.0


def is_finished(run: Path, *, steps: int) -> bool:
    """Whether a training run has nothing left to do."""
    evaluations = read_record(run / METRICS).evaluations
    return bool(evaluations) and evaluations[-1].step == steps and (run / "final").is_dir()


def clear_students(workspace: Workspace) -> None:
    """Forget what this run's students have learnt."""
    for student in (*STUDENTS, WARM_UP, ON_POLICY):
        shutil.rmtree(workspace.run(student), ignore_errors=True)


def _teacher_part(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in asdict(plan).items() if not name.startswith("student")}


def _digest(settings: dict[str, Any], corpus: Corpus) -> str:
    """Of everything that a model depends on."""
    made_with = {name: version(name) for name in ("kdmesh", "tokenizers", "torch", "transformers")}
    text = json.dumps([settings, corpus.digest(), made_with], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
