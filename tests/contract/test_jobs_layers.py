"""Real jobs that compare layers: a teacher server that answers their outputs, over sockets and shared memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.support.teacher_process import await_ready, started
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import losses, records, run_job, serving_teacher, write_config

STEPS = 8
LAYERS: dict[str, Any] = {"pairs": {1: 2, 2: 4}, "weight": 0.5, "distance": "mse"}


def kdmesh(command: str, config: Path, *arguments: str) -> tuple[int, str]:
    told = [str(Path(sys.executable).with_name("kdmesh")), command, str(config), *arguments]
    done = subprocess.run(told, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_student_nears_its_teachers_layers_and_goes_on_with_its_maps_on_any_number_of_ranks(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("qwen3", seed=1)
    teacher = tiny_models.path("qwen3", seed=2, hidden_size=48, num_hidden_layers=4, vocab_size=336)
    runs = {}
    with serving_teacher(tmp_path, teacher) as address:
        for name, door, parts in (
            ("whole", "shm", [(STEPS, 1)]),
            ("in parts", "stream", [(STEPS // 2, 2), (STEPS, 1)]),
            ("together", "shm", [(STEPS, 2)]),
        ):
            (tmp_path / name).mkdir()
            config = write_config(
                tmp_path / name,
                student=student,
                teacher=address,
                steps=STEPS,
                objective={"name": "distill", "ce_weight": 0.2, "layers": LAYERS},
                optimizer={"learning_rate": 0.005, "schedule": "constant"},
                parallel={"context": 2 if name == "together" else 1},
            )
            for steps, ranks in parts:
                for outcome in run_job(config, f"steps={steps}", f"teacher.door={door}", ranks=ranks):
                    assert outcome.exit_code == 0, outcome.errors
            runs[name] = tmp_path / name / "run"
    for name in ("in parts", "together"):
        assert list(losses(runs[name])) == list(range(STEPS))
        for step, loss in losses(runs["whole"]).items():
            assert losses(runs[name])[step] == pytest.approx(loss, rel=2e-4)
    distances = [step["layer_distance"] for step in records(runs["whole"], "step")]
    assert distances[-1] < 0.9 * distances[0]
    for step in records(runs["whole"], "step"):
        parts_of_it = step["divergence_nats_per_token"] + 0.2 * step["cross_entropy_nats_per_token"]
        assert step["loss_nats_per_token"] == pytest.approx(parts_of_it + 0.5 * step["layer_distance"], rel=1e-5)
    written, original = (AutoModelForCausalLM.from_pretrained(path) for path in (runs["whole"] / "final", student))
    assert written.state_dict().keys() == original.state_dict().keys()  # the maps are no part of the model


@pytest.mark.slow
def test_a_teacher_that_follows_the_student_has_its_layers_where_they_are_new(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student = tiny_models.path("qwen3", seed=1)
    with serving_teacher(tmp_path, student, updatable=True) as address:
        config = write_config(
            tmp_path,
            student=student,
            teacher=address,
            steps=5,
            objective={"name": "distill", "ce_weight": 1.0, "layers": LAYERS | {"pairs": {1: 1, 2: 2}}},
            optimizer={"learning_rate": 0.01, "schedule": "constant"},
        )
        (outcome,) = run_job(config, "teacher.follows_student={every: 2}")
        assert outcome.exit_code == 0, outcome.errors
    distances = [step["layer_distance"] for step in records(tmp_path / "run", "step")]
    assert max(distances[0::2]) < 1e-9 < 1e-6 < min(distances[1::2])


@pytest.fixture
def config(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        student=tiny_models.path("qwen3", seed=1),
        teacher="127.0.0.1:1",
        steps=1,
        objective={"name": "distill", "layers": LAYERS},
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["objective.layers.pairs={3: 1}"], "names layer 3 of the student, which has layers 1 to 2"),
        (
            ["objective.layers.pairs={1: 3}", "teacher.follows_student={}"],
            "names layer 3 of the teacher, which has layers 1 to 2",
        ),
        (["objective.layers.pairs={0: 1}"], "objective.layers.pairs"),
        (["objective.layers.pairs={}"], "objective.layers.pairs"),
        (["objective.layers.weight=0"], "objective.layers.weight"),
        (["objective.layers.distance=l1"], "objective.layers.distance"),
        (["teacher.wire=fp8"], "objective.layers does not go with teacher.wire fp8"),
        (["data.teacher_tokenizer={path: other}"], "objective.layers does not go with data.teacher_tokenizer"),
        (
            ["teacher=null", "teachers={a: {addresses: ['127.0.0.1:1']}}"],
            "objective.layers takes a single `teacher`, not `teachers`",
        ),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_before_anything_loads(
    config: Path, overrides: list[str], sentence: str
) -> None:
    code, said = kdmesh("check", config, *(part for override in overrides for part in ("--set", override)))
    assert code == 2
    assert sentence in said


def test_layers_that_can_be_compared_are_not(config: Path) -> None:
    code, said = kdmesh("check", config)
    assert code == 0, said


@pytest.mark.parametrize("layers", [0, 3])
def test_a_teacher_that_does_not_give_them_is_refused_before_the_student_loads(
    config: Path, tmp_path: Path, layers: int
) -> None:
    served = tmp_path / "teacher.yaml"
    tree = {"engine": {"kind": "fake", "num_layers": layers}, "server": {"port": 0, "rest_port": 0, "drain_s": 5}}
    served.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with started(tmp_path, "-m", "kdmesh_teacher", str(served)) as process:
        address = await_ready(process).grpc
        (outcome,) = run_job(config, f"teacher.addresses=['{address}']")
    assert outcome.exit_code == 2
    said = "gives final hidden states alone" if layers == 0 else "wants the output of layer 4"
    assert said in outcome.errors
    assert "student loaded" not in outcome.errors
