"""Weights that rest are out of memory, and come back to the last bit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kdmesh.errors import Unavailable
from kdmesh.models import resting_weights
from kdmesh.models.body import load_causal_lm
from kdmesh.models.resting_weights import RestingWeights
from kdmesh.types import EVERY_TAG, Sampling, SleepTag, TokenSequence
from kdmesh_rollout.config import TransformersEngine as RolloutConfig
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine as RolloutEngine
from kdmesh_teacher.config import TransformersEngine as TeacherConfig
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.transformers_engine import TransformersEngine as TeacherEngine
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.slow

# About 60 MB of weights, which sleep and wake in a process that does nothing else.
_MEASURE = """
import psutil, sys, torch
from pathlib import Path
from kdmesh.models.body import load_causal_lm
from kdmesh.models.resting_weights import RestingWeights
dtype = getattr(torch, sys.argv[2])
model = load_causal_lm(Path(sys.argv[1]), dtype, torch.device("cpu"))
resident = lambda: psutil.Process().memory_info().rss
print(sum(p.nbytes for p in model.parameters()))
[p.sum() for p in model.parameters()]  # read them all
print(resident())
resting = RestingWeights(model)
print(resident())
resting.restore()
print(resident())
"""


def rows(engine: TeacherEngine, sequences: list[TokenSequence], hidden_size: int) -> bytes:
    out = bytearray(sum(s.num_rows for s in sequences) * hidden_size * 2)
    engine.prefill([PrefillJob(sequences=tuple(sequences), out=memoryview(out))])
    return bytes(out)


def test_a_teachers_rows_are_the_same_bits_after_sleep(tiny_models: TinyModels) -> None:
    engine = TeacherEngine(TeacherConfig(model=tiny_models.path("gemma2", dtype=torch.bfloat16), device="cpu"))
    hidden_size = engine.load().hidden_size
    asked = random_sequences([33, 2, 60], vocabulary_size=VOCABULARY_SIZE)
    before = rows(engine, asked, hidden_size)
    head = bytes(engine.head_parts().weight)
    for tags in (EVERY_TAG, {SleepTag.WEIGHTS}, {SleepTag.KV_CACHE}):
        engine.sleep(tags)
        engine.wake(tags)
        assert rows(engine, asked, hidden_size) == before
    assert bytes(engine.head_parts().weight) == head


def samples(engine: RolloutEngine, first_key: int) -> list[tuple[list[int], bytes]]:
    for number in range(3):
        ids = np.arange(3, 9 + number, dtype=np.int32)
        engine.add(Order(key=first_key + number, prompt_ids=ids, sampling=Sampling(max_new_tokens=8), seed=number))
    found = {}
    while engine.num_running:
        found |= {one.key: one.sample for one in engine.step()}
    return [(found[key].token_ids.tolist(), found[key].logprobs.tobytes()) for key in sorted(found)]


@pytest.mark.parametrize("is_alone", [False, True])  # each sample: products of one row depend on where a matrix begins
@pytest.mark.parametrize("vocabulary", [VOCABULARY_SIZE, 352])  # the head whole, and cut to the tokenizer's tokens
def test_a_rollout_engines_samples_are_the_same_bits_after_sleep_and_after_new_weights(
    tiny_models: TinyModels, vocabulary: int, is_alone: bool
) -> None:
    path = tiny_models.path("qwen3", tie_word_embeddings=not is_alone, vocab_size=vocabulary)
    cfg = RolloutConfig(model=path, device="cpu", deterministic=is_alone)
    engine, other = (RolloutEngine(cfg) for _ in range(2))
    specs = engine.load() and engine.tensor_specs()
    other.load()
    before = samples(engine, 0)
    engine.sleep(EVERY_TAG)
    engine.wake(EVERY_TAG)
    assert samples(engine, 10) == before
    engine.sleep(EVERY_TAG)
    engine.wake({SleepTag.WEIGHTS})
    assert engine.tensor_specs() == specs
    for each in (engine, other):
        each.begin()
        for place, spec in enumerate(specs):
            each.write(place, 0, memoryview(np.full(spec.size_bytes // 4, 0.01, np.float32)).cast("B"))
        each.commit(1)
    engine.wake({SleepTag.KV_CACHE})
    assert samples(engine, 20) == samples(other, 20) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # mapped from the checkpoint's file; converted
def test_resting_weights_are_out_of_memory(tiny_models: TinyModels, dtype: str) -> None:
    path = tiny_models.path("qwen3", vocab_size=60_000, hidden_size=128, tokenizer=False)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), dtype], check=True, capture_output=True, text=True
    )
    size, before, asleep, after = map(int, done.stdout.split())
    assert before - asleep > 0.9 * size
    assert after - asleep > 0.9 * size


def test_without_room_for_them_weights_stay_where_they_are(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(tiny_models.path("qwen3"), "auto", torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, data: object) -> int:
            if self.tell() > 10_000:
                raise OSError(28, "No space left on device")
            return super().write(data)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", lambda prefix: Full())
        with pytest.raises(Unavailable, match=r"no room to keep the weights: .Errno 28. No space left"):
            RestingWeights(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_for_which_there_is_no_memory_go_on_resting(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(tiny_models.path("qwen3"), "auto", torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    resting = RestingWeights(model)
    assert {p.numel() for p in model.parameters()} == {0}

    empty, taken, left = torch.empty, weakref.WeakSet[torch.Tensor](), list[int]()

    def full_soon(*arguments: Any, **options: Any) -> torch.Tensor:
        if len(taken) == 3:
            raise torch.OutOfMemoryError("none left")
        taken.add(tensor := empty(*arguments, **options))
        return tensor

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full_soon)
        patched.setattr(resting_weights, "give_back_memory", lambda device: left.append(len(taken)))
        with pytest.raises(Unavailable, match="cannot come back: none left"):
            resting.restore()
    assert left == [0]  # tensors that hold memory when it is given back
    assert {p.numel() for p in model.parameters()} == {0}
    resting.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
