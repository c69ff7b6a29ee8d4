"""Holds what pages for users quote against the source: messages, configuration keys, figures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kdmesh import config
from kdmesh.config import key_paths
from kdmesh.demo import ingredients
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.stats import Scores, StepStats

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_QUOTED = re.compile(r"^\| `(.+?)`", re.MULTILINE)
_CODE = re.compile(r"`([\w.]+)`")


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """Cells of the tables below a heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("|---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@cache
def sentences() -> tuple[str, ...]:
    """Every text of the source; what an f-string puts in is a zero byte."""
    found = []
    for path in [*(ROOT / "kdmesh").rglob("*.py"), *(ROOT / "services").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
            if any(isinstance(text, str) and text != "\0" for text in texts):
                found.append("".join(str(text) for text in texts))
    return tuple(found)


def is_said(message: str) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
    return any(pattern.search(sentence.replace("`", "")) for sentence in sentences())


def messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [quoted for quoted in _QUOTED.findall(text) if " " in quoted]


def test_a_message_that_is_said_nowhere_is_noticed() -> None:
    assert len(messages()) > 20
    assert not is_said("the teacher has gone fishing")
    assert not is_said("dataset ... is full")


@pytest.mark.parametrize("message", messages())
def test_every_quoted_message_is_one_that_is_said(message: str) -> None:
    assert is_said(message)


@pytest.mark.parametrize("heading", ["7. Keys that you know from elsewhere", "8. Change a run"])
def test_every_key_of_the_quickstart_is_one(heading: str) -> None:
    known = {".".join(path) for path in key_paths(TrainerConfig)} | {"engine.model"}
    values = {"jensen_shannon", "fsdp", "moments"}
    named = {code for _, right in rows("quickstart.md", heading) for code in _CODE.findall(right)} - values
    assert len(named) > 8
    assert named <= known


def test_every_figure_of_a_record_is_explained() -> None:
    step = StepStats(
        loss_nats_per_token=1.0,
        divergence_nats_per_token=1.0,
        cross_entropy_nats_per_token=1.0,
        top1_agreement=1.0,
        layer_distance=1.0,
        gradient_norm=1.0,
        learning_rate=1.0,
        num_loss_tokens=1,
        num_tokens=1,
        teacher_wait_s=0.0,
    )
    held_out = Scores(
        kl_nats_per_token=1.0, cross_entropy_nats_per_token=1.0, top1_agreement=1.0, num_loss_tokens=1, num_sequences=1
    )
    explained = {code for what, *_ in rows("metrics.md", "A run's own record") for code in _CODE.findall(what)}
    beside = {"step_s", "tokens_per_second", "teacher_wait_fraction", "bounded_by", "phase_s", "evaluate_s", "door"}
    assert {*step.figures(), *held_out.figures(), *beside, "phase_tokens_per_second"} == explained


def test_what_the_quickstart_makes_is_what_the_examples_name() -> None:
    """`kdmesh demo --make models && ln -s models/data data`, and then the examples as they are."""
    commands = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    assert "kdmesh demo --make models && ln -s models/data data\nkdmesh train examples/train.yaml" in commands
    teacher = config.read_tree(ROOT / "examples" / "teacher.yaml")
    trainer = config.read_tree(ROOT / "examples" / "train.yaml")
    assert teacher["engine"]["model"] == f"models/{ingredients.TEACHER}"
    assert trainer["student"]["model"] == f"models/{ingredients.STUDENT}"
    assert {trainer["data"][key]["path"] for key in ("train", "held_out")} == {
        f"{ingredients.DATA}/{name}.jsonl" for name in ("train", "held_out")
    }
