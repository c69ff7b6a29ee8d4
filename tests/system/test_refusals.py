"""What cannot work is refused in one sentence, with exit code 2, before the first step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.free_port import free_port
from tests.support.tiny_models import save_model, save_tokenizer
from tests.support.trainer_jobs import write_chats
from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

SENTENCES = {
    "tokenizer": r"teacher qwen3\S* has another tokenizer \(fingerprint \w+\) than the student \(fingerprint \w+\); "
    "distributions over different vocabularies cannot be compared token by token",
    "data": r"/\S+/train\.jsonl:3: not JSON: .+ at column 22",
    "student": r"/\S+/no-model has no config\.json, so it is not a Hugging Face model directory",
    "nobody": r"no teacher is ready within 0\.5 s \(127\.0\.0\.1:\d+: .*\)",
    "teacher": r"/\S+/no-model has no config\.json, so it is not a Hugging Face model directory",
}
"""By what is wrong."""


@pytest.fixture(scope="module")
def refused(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Process]:
    """A process for each case, started."""
    root, address = tmp_path_factory.mktemp("refused"), undisturbed.teacher.address
    students = {
        "tokenizer": replace(materials.plain, student=_student_of_other_words(root)),
        "data": replace(materials.plain, data=_data_with_half_a_line(root)),
        "student": replace(materials.plain, student=_no_model(root)),
    }
    jobs = {name: Job(processes, root / name, recipe, address) for name, recipe in students.items()}
    nobody = f"127.0.0.1:{free_port()}"
    jobs["nobody"] = Job(processes, root / "nobody", materials.plain, nobody, teacher={"deadline_s": 0.5})
    teacher = Teacher(processes, root / "teacher", root / "no-model")
    teacher.start()
    return {"teacher": teacher.process} | {name: job.start() for name, job in jobs.items()}


def _student_of_other_words(root: Path) -> Path:
    path = root / "other-words"
    save_model(path, "qwen3", seed=1, dtype=torch.float32)
    save_tokenizer(path, bos_token="<|begin|>")
    return path


def _data_with_half_a_line(root: Path) -> Path:
    path = root / "half-a-line"
    path.mkdir()
    lines = write_chats(path / "train.jsonl", 4, seed=1).read_text().splitlines()
    lines[2] = lines[2][:21]
    (path / "train.jsonl").write_text("\n".join(lines))
    return path


def _no_model(root: Path) -> Path:
    path = root / "no-model"
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("case", SENTENCES)
def test_what_cannot_work_is_refused_in_one_sentence(refused: dict[str, Process], case: str) -> None:
    process = refused[case]
    assert process.exit_code() == (3 if case == "nobody" else 2)  # the same may work when somebody is there
    (sentence,) = process.words()
    assert re.fullmatch(f"Error: {SENTENCES[case]}", sentence)
    assert not process.events("progress")
