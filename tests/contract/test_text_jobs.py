"""Whole jobs on plain text: what they minimise, and that a student nears its teacher on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import evaluations, losses, run_job, serving_teacher, write_config

pytestmark = pytest.mark.slow

MAX_TOKENS = 32
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and returns a value when it is asked. " * 3,
    "Nothing.",
    "def wrap(self, text):\n    return self._wrap_chunks(self._split_chunks(text))\n",
]


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def base_model(model: Path) -> Path:
    """Without a chat template, as base models are."""
    (model / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    return model


def pieces(model: Path) -> list[list[int]]:
    """Of every text its tokens and its end, in sequences that begin with the last token of the one before."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        while len(ids) > 1:
            found.append(ids[:MAX_TOKENS])
            ids = ids[MAX_TOKENS - 1 :]
    return found


def test_sft_on_texts_minimises_the_cross_entropy_of_all_of_their_tokens(tmp_path: Path) -> None:
    student = base_model(TinyModels(tmp_path / "models").path("qwen3", seed=1))
    sequences = pieces(student)
    assert len(sequences) > len(TEXTS)
    config = write_config(
        tmp_path,
        student=student,
        teacher=None,
        steps=1,
        objective={"name": "sft"},
        data={
            "train": {"format": "text", "path": str(write_texts(tmp_path / "texts.jsonl"))},
            "max_tokens": MAX_TOKENS,
        },
        batch={"sequences": len(sequences), "max_tokens": 64},
    )
    for outcome in run_job(config, ranks=2):
        assert outcome.exit_code == 0, outcome.errors
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        each = [
            cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
            for ids in sequences
        ]
    expected = float(sum(each)) / sum(len(ids) - 1 for ids in sequences)
    [start] = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert (start["ranks"], start["config"]["seed"], start["versions"]["torch"]) == (2, 0, torch.__version__)
    assert len(start["identity"]["data.train (digest)"]) > 8
    assert losses(tmp_path / "run") == {0: pytest.approx(expected, rel=1e-5)}
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template is None


def test_a_student_nears_its_teacher_on_texts(tmp_path: Path) -> None:
    models = TinyModels(tmp_path / "models")
    student, teacher = base_model(models.path("qwen3", seed=1)), base_model(models.path("qwen3", seed=2))
    texts = {"format": "text", "path": str(write_texts(tmp_path / "texts.jsonl"))}
    with serving_teacher(tmp_path, teacher) as address:
        config = write_config(
            tmp_path,
            student=student,
            teacher=address,
            steps=6,
            data={"train": texts, "held_out": texts, "max_tokens": MAX_TOKENS},
        )
        (outcome,) = run_job(config)
    assert outcome.exit_code == 0, outcome.errors
    scores = evaluations(tmp_path / "run")
    assert scores[6]["kl_nats_per_token"] < scores[0]["kl_nats_per_token"]
    assert scores[0]["num_loss_tokens"] == sum(len(ids) - 1 for ids in pieces(student))
