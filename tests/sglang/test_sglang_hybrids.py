"""Models with layers of linear attention in SGLang: samples, new weights and rows are those of transformers.

SGLang's kernels for such layers are stood in for (tests/support/sglang_standin); its scheduler, pool of states, prefix
cache and loading of weights are its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import Int32Array, Sample, Sampling, TokenSequence
from kdmesh.weights.manifest import UpdatePolicy
from tests.support.reference_logprobs import forward_logprobs, student
from tests.support.reference_rows import hugging_face_layers, hugging_face_rows
from tests.support.rollout_samples import prompt
from tests.support.sequences import random_sequences
from tests.support.sglang_rollouts import sglang_rollout
from tests.support.sglang_teachers import CHUNK_TOKENS, metric, sglang_teacher
from tests.support.sglang_weights import publish
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels
from tests.support.tiny_vision import TinyVisionModels

pytestmark = pytest.mark.sglang

LENGTHS = (1, 3, 70, CHUNK_TOKENS + 72)  # shorter than the convolution's kernel; more than a chunk


def path(models: TinyModels, family: str, seed: int) -> Path:
    return models.path(family, seed=seed, full_attention_interval=2)  # SGLang reads this in place of layer_types


def ids(num_tokens: int, seed: int = 0) -> Int32Array:
    """No token of an image among them."""
    return prompt(num_tokens, seed=seed, vocabulary_size=VOCABULARY_SIZE - 20) + 10


def check_samples(pool: RolloutPool, model: Path, *, newest: int = 0) -> None:
    """Samples of prompts of LENGTHS, together, have the log-probabilities of `model`."""
    lm = student(model)
    prompts = [ids(length, seed=length) for length in LENGTHS]
    pending = [
        pool.submit(own, Sampling(max_new_tokens=24), num_samples=3, seed=3, min_weight_version=newest)
        for own in prompts
    ]
    for own, answer in zip(prompts, pending, strict=True):
        for sample in answer.wait():
            check(lm, own, sample)


def check(lm: PreTrainedModel, prompt_ids: Int32Array, sample: Sample) -> None:
    expected = forward_logprobs(lm, prompt_ids, sample)
    torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=0, atol=1e-4)


def with_experts_together(model: Path, directory: Path) -> Path:
    """The same model in files that hold all experts of a layer in one tensor, as those of Qwen3.5 do."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(directory, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(directory / "model.safetensors"))
    return directory


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_samples_are_of_the_weights_that_came_last(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    first, new = (path(tiny_models, family, seed) for seed in (0, 1))
    if family == "qwen3_5_moe_text":
        first = with_experts_together(first, tmp_path_factory.mktemp("m"))
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), first) as server,
        RolloutPool([server.grpc], job="test", deadline_s=150) as pool,
    ):
        check_samples(pool, first)
        publish(server.grpc, student(new), 1)
        check_samples(pool, new, newest=1)
        # What is under way is computed anew from its tokens, states too.
        pending = pool.submit(ids(70), Sampling(max_new_tokens=150), num_samples=2, seed=3)
        pool.submit(ids(70), Sampling(max_new_tokens=8), num_samples=1, seed=3).wait()
        publish(server.grpc, student(first), 2, policy=UpdatePolicy.CONTINUE)
        samples = pending.wait()
        assert {sample.max_weight_version for sample in samples} == {2}
        for sample in samples:
            expected = forward_logprobs(student(first), ids(70), sample)[-20:]
            torch.testing.assert_close(torch.from_numpy(sample.logprobs)[-20:], expected, rtol=0, atol=1e-4)


def as_published(model: Path, directory: Path) -> Path:
    """The same model with what a published config.json has, and transformers' own does not."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    told = json.loads((directory / "config.json").read_text())
    told["text_config"]["full_attention_interval"] = 2
    told["vision_config"]["deepstack_visual_indexes"] = []
    (directory / "config.json").write_text(json.dumps(told))
    return directory


def test_a_model_that_reads_images_takes_new_weights(
    tiny_vision: TinyVisionModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, new = (as_published(tiny_vision.path("qwen3_5", seed=seed), tmp_path_factory.mktemp("m")) for seed in (0, 1))
    with (
        sglang_rollout(tmp_path_factory.mktemp("s"), first) as server,  # it has compared samples behind an image
        RolloutPool([server.grpc], job="test", deadline_s=150) as pool,
    ):
        check_samples(pool, first)
        publish(server.grpc, student(new), 1)
        check_samples(pool, new, newest=1)


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return path(tiny_models, "qwen3_5_text", 0)


@pytest.fixture(scope="module")
def teacher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_teacher(tmp_path_factory.mktemp("s"), model) as server:
        yield server


@pytest.fixture
def pool(teacher: TeacherProcess) -> Iterator[TeacherPool]:
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as opened:
        yield opened


def check_rows(pool: TeacherPool, model: Path, asked: list[TokenSequence]) -> None:
    rows_RD = pool.submit(asked).wait().rows_RD
    torch.testing.assert_close(rows_RD, hugging_face_rows(model, asked), rtol=0, atol=2e-4)


def test_rows_of_short_sequences_and_of_several_chunks_are_transformers(pool: TeacherPool, model: Path) -> None:
    check_rows(pool, model, random_sequences((33, 2, 70, CHUNK_TOKENS + 9, 20, 249), vocabulary_size=VOCABULARY_SIZE))


def test_outputs_of_layers_are_transformers(teacher: TeacherProcess, model: Path) -> None:
    asked = random_sequences((33, 2, CHUNK_TOKENS + 9), vocabulary_size=VOCABULARY_SIZE)
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60, layers=(1, 2)) as opened:
        rows_RC = opened.submit(asked).wait().rows_RD
        expected_RC = torch.cat([hugging_face_rows(model, asked), hugging_face_layers(model, asked, (1, 2))], 1)
        torch.testing.assert_close(rows_RC, expected_RC, rtol=1e-4, atol=2e-4)


def test_rows_behind_and_inside_a_prompt_that_is_kept_are_transformers(
    teacher: TeacherProcess, pool: TeacherPool, model: Path
) -> None:
    shared = ids(200, seed=8)
    asked = [np.concatenate([shared, ids(20 + n, seed=n)]) for n in range(6)]
    for first in (200, 3):
        for some in (asked[:4], asked[4:], asked[:2]):
            check_rows(
                pool,
                model,
                [
                    TokenSequence(token_ids=own, positions=np.arange(first, len(own) - 1, dtype=np.int32))
                    for own in some
                ],
            )
    assert metric(teacher, "kdmesh_teacher_cached_tokens_total") > 4 * CHUNK_TOKENS
