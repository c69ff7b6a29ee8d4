"""What is wrong on a rank's own machine is refused before it waits for a teacher."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import run_job, write_config

NOBODY = "127.0.0.1:9"


def without_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return f"{model} has no weights"


def cut_off(model: Path) -> str:
    os.truncate(model / "model.safetensors", 20_000)
    return f"{model / 'model.safetensors'} is cut short: it has 20000 of"


@pytest.mark.parametrize("spoil", [without_weights, cut_off])
def test_a_student_without_whole_weights_waits_for_no_teacher(
    tiny_models: TinyModels, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    student = shutil.copytree(tiny_models.path("qwen3", seed=1), tmp_path / "student")
    words = spoil(student)
    (outcome,) = run_job(write_config(tmp_path, student=student, teacher=NOBODY, steps=2))
    assert outcome.exit_code == 2
    assert words in outcome.errors
    assert "no teacher" not in outcome.errors


def test_a_port_of_metrics_that_is_taken_waits_for_no_teacher(tiny_models: TinyModels, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(
            tmp_path, student=tiny_models.path("qwen3", seed=1), teacher=NOBODY, steps=2, metrics={"port": port}
        )
        (outcome,) = run_job(config)
    assert outcome.exit_code == 2
    assert outcome.errors == f"Error: metrics: cannot listen on 127.0.0.1:{port}: Address already in use\n"
