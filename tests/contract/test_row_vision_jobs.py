"""Whole jobs of student and teacher whose image tokens are numbered as words are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdmesh.models.body import load_causal_lm
from kdmesh.models.verify import check_images
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_vision import TinyVisionModels, png, reader_of
from tests.support.trainer_jobs import losses, records, run_job, serving_rollouts, serving_teacher, write_config


def write_pictures(directory: Path) -> dict[str, Any]:
    """`data` of chats about no picture, one, or two of different sizes, one right behind the other."""
    rows = []
    for number in range(12):
        parts: list[dict[str, str]] = []
        for index in range(number % 3):
            name = f"{number}-{index}.png"
            (directory / name).write_bytes(png(24 + 16 * index, 16 + 8 * (number % 4), seed=10 * number + index))
            parts.append({"type": "image", "image": name})
        parts.append({"type": "text", "text": "what is it"})
        answer = {"role": "assistant", "content": f"the quick brown fox {number}"}
        rows.append(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}))
    (directory / "pictures.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {"train": {"format": "chat", "path": str(directory / "pictures.jsonl")}, "max_tokens": 192}


def succeed(config: Path, *overrides: str, ranks: int = 2) -> None:
    for outcome in run_job(config, *overrides, ranks=ranks):
        assert outcome.exit_code == 0, outcome.errors


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "internvl")) for name in ROW_FAMILIES]
)
def test_a_job_learns_from_images_goes_on_and_writes_a_model_and_samples_of_it(
    tiny_vision: TinyVisionModels, tmp_path: Path, family: str
) -> None:
    student = tiny_vision.path(family, seed=1)
    data, configs = write_pictures(tmp_path), []
    with (
        serving_teacher(tmp_path, tiny_vision.path(family, seed=2)) as address,
        serving_rollouts(tmp_path, student) as sampler,
    ):
        for name in ("whole", "parts", "sampled"):
            (tmp_path / name).mkdir()
            sections = {"batch": {"sequences": 4, "max_tokens": 256}, "checkpoint": {"every": 2}, "data": data}
            configs.append(write_config(tmp_path / name, student=student, teacher=address, steps=4, **sections))
        whole, parts, sampled = configs
        succeed(whole)
        succeed(parts, "steps=2")
        succeed(parts)
        rollouts = f"{{addresses: ['{sampler}'], deadline_s: 100}}"
        source = f"source={{kind: on_policy, rollouts: {rollouts}, sampling: {{max_new_tokens: 8}}}}"
        succeed(sampled, source, "student.lora={rank: 2}", "student.activation_checkpointing=all", ranks=1)
    assert losses(tmp_path / "parts" / "run") == losses(tmp_path / "whole" / "run")
    drawn = [step["sampler_kl_k1_nats"] for step in records(tmp_path / "sampled" / "run", "step")]
    assert len(drawn) == 4
    assert all(abs(nats) < 1e-4 for nats in drawn)  # the sampler has every step's new weights, and sees the images
    for name in ("whole", "sampled"):
        final = tmp_path / name / "run" / "final"
        before, after = (load_file(path / "model.safetensors") for path in (student, final))
        assert before.keys() == after.keys()
        moved = {tensor for tensor, value in before.items() if not torch.equal(after[tensor], value)}
        language = {tensor for tensor in moved if "language_model." in tensor or "text_model." in tensor}
        tower = {tensor for tensor in moved if "vision_tower." in tensor or "vision_model." in tensor}
        assert language
        assert tower or name == "sampled"
        check_images(load_causal_lm(final, torch.float32, torch.device("cpu")), reader_of(final))
