"""On-policy jobs that compare layers, in dual space, or across tokenizers, with the real services; each killed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.support.other_tokenizers import save_sentence_piece
from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe

pytestmark = pytest.mark.slow

STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is learnt, and from whom."""

    objective: Mapping[str, Any]
    has_other_tokenizer: bool
    sampled_fraction: float = 1.0
    projectors: str = ""  # what parameters are called that are trained beside the student's; empty: there are none


CASES = {
    "dskd": Case(
        objective={"algorithm": {"name": "dskd"}, "divergence": {"name": "reverse_kl"}},
        has_other_tokenizer=False,
        projectors="teacher_to_student",
    ),
    "layers": Case(
        objective={"layers": {"pairs": {1: 1, 2: 2}, "weight": 0.3}},
        has_other_tokenizer=False,
        projectors="maps.1.weight",
    ),
    "dskd across tokenizers": Case(
        objective={"algorithm": {"name": "dskd", "learning_rate_factor": 2}, "ce_weight": 0.5},
        has_other_tokenizer=True,
        sampled_fraction=0.5,
        projectors="teacher_to_student",
    ),
    "uld": Case(
        objective={"algorithm": {"name": "uld"}, "ce_weight": 0.5}, has_other_tokenizer=True, sampled_fraction=0.5
    ),
    "gold": Case(objective={"algorithm": {"name": "gold", "matched_weight": 1}}, has_other_tokenizer=True),
    "alm": Case(
        objective={"algorithm": {"name": "alm", "debias_above": 0.1}}, has_other_tokenizer=True, sampled_fraction=0.5
    ),
    "shared tokens": Case(
        objective={"divergence": {"name": "jensen_shannon"}, "ce_weight": 0.5},
        has_other_tokenizer=True,
        sampled_fraction=0.5,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherTeacher:
    """One that has another tokenizer than the student."""

    server: Teacher
    tokenizer: Path


@pytest.fixture(scope="module")
def teacher(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    server = Teacher(processes, tmp_path_factory.mktemp("teachers") / "same", materials.teacher)
    server.start()
    return server


@pytest.fixture(scope="module")
def other_teacher(
    tiny_models: TinyModels, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> OtherTeacher:
    root = tmp_path_factory.mktemp("other")
    size = save_sentence_piece(root / "tokenizer")
    model = tiny_models.path("qwen3", seed=2, hidden_size=48, vocab_size=size + 7, tokenizer=False)
    save_sentence_piece(model)
    server = Teacher(processes, root / "server", model)
    server.start()
    return OtherTeacher(server=server, tokenizer=root / "tokenizer")


def job(
    processes: Processes, directory: Path, recipe: Recipe, case: Case, *, server: Teacher, tokenizer: Path | None
) -> Job:
    """Two ranks, with a rollout server of its own, which is started here."""
    rollouts = Rollouts(processes, directory.with_name(f"{directory.name}-rollouts"), recipe.student)
    rollouts.start()
    data: dict[str, Any] = {
        name: {"format": "chat", "path": str(recipe.data / f"{name}.jsonl")} for name in ("train", "held_out")
    }
    if tokenizer is not None:
        data["teacher_tokenizer"] = {"path": str(tokenizer), "min_aligned": 0.2}
    return Job(
        processes,
        directory,
        replace(recipe, objective=case.objective, is_judged=True),
        server.address,
        steps=STEPS,
        data={**data, "max_tokens": 96},
        source={
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 16},
            "sampled_fraction": case.sampled_fraction,
        },
        batch={"sequences": 8, "max_tokens": 128},
        optimizer={"learning_rate": 5e-3, "schedule": "constant"},
        evaluation={"every": STEPS},
        checkpoint={"every": 3, "keep": 1},
    )


@pytest.mark.parametrize("name", CASES)
def test_it_learns_from_samples_and_goes_on_exactly_after_a_kill(
    name: str,
    materials: Materials,
    teacher: Teacher,
    other_teacher: OtherTeacher,
    processes: Processes,
    tmp_path: Path,
) -> None:
    case = CASES[name]
    server, tokenizer = (other_teacher.server, other_teacher.tokenizer) if case.has_other_tokenizer else (teacher, None)
    whole, killed = (
        job(processes, tmp_path / each, materials.plain, case, server=server, tokenizer=tokenizer)
        for each in ("whole", "killed")
    )
    running, first = whole.start_ranks(2), killed.start_ranks(2)
    first.until(lambda: len(killed.steps()) >= 5)
    psutil.Process(first.pid).children()[0].kill()
    assert first.exit_code() == 1
    second = killed.start_ranks(2)
    running.succeed()
    second.succeed()
    assert killed.record() == whole.record()
    assert second.events("continuing from a checkpoint")[0]["step"] >= 3
    steps = whole.steps()
    assert len(steps) == STEPS
    for step in steps:
        assert 1 <= step["response_tokens_mean"] <= 16
        assert abs(step["sampler_kl_k1_nats"]) < 1e-4  # the ids that were drawn are those that are trained on
        assert (step.get("aligned_fraction") is not None) == case.has_other_tokenizer
    # Those that learn from the data's answers too come nearer to these, and not to a teacher that was never trained.
    nearer_to = "cross_entropy" if "ce_weight" in case.objective else "kl"
    scores = [line[f"{nearer_to}_nats_per_token"] for line in whole.lines() if line["kind"] == "evaluation"]
    assert scores[-1] < scores[0]
    _assert_projectors_are_kept(whole, case.projectors)


def _assert_projectors_are_kept(whole: Job, name: str) -> None:
    """In the checkpoint, and not in the model."""
    (checkpoint,) = (whole.output / "checkpoints").iterdir()
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert any(key.endswith(name) for key in saved if "algorithm" in key) == bool(name)
    with safe_open(whole.output / "final/model.safetensors", framework="pt") as written:
        assert not any("to_student" in key or "maps" in key for key in written.keys())  # noqa: SIM118 - it is no mapping
