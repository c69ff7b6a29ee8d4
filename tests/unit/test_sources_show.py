"""Samples that are shown are the step's own, once each."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from kdmesh.errors import CheckpointError
from kdmesh.types import FinishReason, Float32Array, Int32Array, Sample
from kdmesh_trainer.sources.rollouts import Rollout
from kdmesh_trainer.sources.show import Showcase


def ids(*numbers: int) -> Int32Array:
    return np.array(numbers, np.int32)


def rollout(prompt: Int32Array, *response: int, teacher: Int32Array | None = None) -> Rollout:
    logprobs: Float32Array = np.full(len(response), -1, np.float32)
    reason = FinishReason.STOP if response[-1] == 0 else FinishReason.LENGTH
    sample = Sample(
        token_ids=ids(*response),
        logprobs=logprobs,
        finish_reason=reason,
        min_weight_version=1,
        max_weight_version=1,
    )
    return Rollout.of(prompt, sample, teacher_prompt_ids=teacher)


def showcase(path: Path) -> Showcase:
    decode = lambda ids: " ".join(map(str, ids.tolist()))  # noqa: E731
    return Showcase(path / "samples.jsonl", decode, decode_teacher=lambda ids: f"{ids}", every=2, samples_per_prompt=2)


def test_lines_of_earlier_steps_are_kept_whatever_their_texts_hold(tmp_path: Path) -> None:
    decode = lambda ids: "a\u2028 1 \u2029b\x85"  # noqa: E731
    path = tmp_path / "samples.jsonl"
    shown = Showcase(path, decode, decode_teacher=decode, every=1, samples_per_prompt=2)
    for step in range(4):
        shown.show(step, [rollout(ids(5), 7, 0)])
    shown.start(3)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines if line] == [0, 1, 2]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"samples\.jsonl cannot be written: .*; checkpoints are untouched"):
        showcase(tmp_path).show(0, [rollout(ids(5), 7, 0)])


def test_the_first_prompt_is_shown_with_all_its_responses_every_few_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = showcase(tmp_path)
    shown.start(0)
    with caplog.at_level(logging.INFO):
        for step in range(4):
            first, other = ids(5, 6, step), ids(9)
            shown.show(step, [rollout(first, 7, 0), rollout(first, 8, 8), rollout(other, 1), rollout(other, 2)])
        told_of = [(r.getMessage(), r.step, r.response) for r in caplog.records]  # type: ignore[attr-defined]
    shown.start(2)  # continued from step 2
    told = ids(1, 2)
    shown.show(2, [rollout(ids(3), 4, 0, teacher=told), rollout(ids(3), 5, teacher=told)])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "step": 0,
            "prompt": "5 6 0",
            "responses": [{"text": "7 0", "is_cut_off": False}, {"text": "8 8", "is_cut_off": True}],
        },
        {
            "step": 2,
            "prompt": "3",
            "teacher_prompt": "[1 2]",  # in the teacher's tokens
            "responses": [{"text": "4 0", "is_cut_off": False}, {"text": "5", "is_cut_off": True}],
        },
    ]
    assert told_of == [
        ("sample", 0, "7 0"),
        ("sample", 0, "8 8"),
        ("sample", 2, "7 0"),
        ("sample", 2, "8 8"),
    ]
