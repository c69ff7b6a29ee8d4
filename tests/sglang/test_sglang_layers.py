"""Outputs of layers, as SGLang's scheduler process writes them behind final hidden states, are Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdmesh import errors
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.types import TokenSequence
from tests.support.reference_logprobs import student
from tests.support.reference_rows import hugging_face_layers, hugging_face_rows
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import CHUNK_TOKENS, metric, sglang_teacher
from tests.support.sglang_weights import publish
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels
from tests.support.trainer_jobs import records, run_job, serving_teacher, write_config

pytestmark = pytest.mark.sglang

CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # a list for each process
WIDE = {"slots": 8, "slot_mib": 4, "slots_per_session": 8}


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", num_hidden_layers=3, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def teacher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_teacher(tmp_path_factory.mktemp("s"), model, slab=WIDE) as server:
        yield server


def pool(teacher: TeacherProcess, *layers: int) -> TeacherPool:
    return TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60, layers=layers)


def sequences(*lengths: int, seed: int) -> list[TokenSequence]:
    return random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed)


def whole(ids: np.ndarray, first: int = 0) -> TokenSequence:
    return TokenSequence(token_ids=ids, positions=np.arange(first, len(ids) - 1, dtype=np.int32))


def errors_of(rows_RC: Tensor, model: Path, asked: Sequence[TokenSequence], *layers: int) -> list[float]:
    """Of the final hidden states, and of each layer: the relative error."""
    expected_RC = torch.cat([hugging_face_rows(model, asked), hugging_face_layers(model, asked, layers)], 1)
    assert rows_RC.shape == expected_RC.shape
    parts = (each_RC.chunk(1 + len(layers), 1) for each_RC in (rows_RC, expected_RC))
    return [relative_error(*each) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("layers", [(1,), (2, 3), (1, 2, 3)])
def test_outputs_equal_hugging_face_also_of_prompts_that_are_cut(
    teacher: TeacherProcess, model: Path, layers: tuple[int, ...]
) -> None:
    asked = sequences(33, 2, 3 * CHUNK_TOKENS - 3, 20, CHUNK_TOKENS, seed=1)
    with pool(teacher, *layers) as opened:
        assert opened.describe().num_layers == 3
        assert max(errors_of(opened.submit(asked).wait().rows_RD, model, asked, *layers)) < 1e-5


def test_requests_for_other_layers_and_for_none_share_batches(teacher: TeacherProcess, model: Path) -> None:
    wanted: list[tuple[int, ...]] = [(), (1,), (3,), (1, 3), ()]
    pools = [pool(teacher, *layers) for layers in wanted]
    asked = [sequences(30 + n, 9, 150 + n, seed=20 + n) for n in range(len(wanted))]
    pending = [(n, pools[n].submit(asked[n])) for _ in range(3) for n in range(len(wanted))]
    for n, answer in pending:
        rows_RC = answer.wait().rows_RD
        if wanted[n]:
            assert max(errors_of(rows_RC, model, asked[n], *wanted[n])) < 1e-5
        else:
            assert relative_error(rows_RC, hugging_face_rows(model, asked[n])) < 1e-5
    for each in pools:
        each.close()


def test_final_hidden_states_are_the_same_bits_with_layers_and_without(teacher: TeacherProcess) -> None:
    asked = [whole(np.random.default_rng(7).integers(0, VOCABULARY_SIZE, 300, dtype=np.int32))]
    with pool(teacher) as plain, pool(teacher, 2) as layered:
        before = plain.submit(asked).wait().rows_RD.clone()
        rows_RC = layered.submit(asked).wait().rows_RD
        assert torch.equal(rows_RC[:, : before.shape[1]], before)
        assert torch.equal(plain.submit(asked).wait().rows_RD, before)


def test_a_prefix_that_the_cache_keeps_is_not_computed_again_but_where_it_is_wanted(
    teacher: TeacherProcess, model: Path
) -> None:
    random = np.random.default_rng(3)
    prompt = random.integers(0, VOCABULARY_SIZE, 300, dtype=np.int32)
    answers = [random.integers(0, VOCABULARY_SIZE, 20 + n, dtype=np.int32) for n in range(4)]
    asked = [whole(np.concatenate([prompt, answer]), first=300) for answer in answers]
    inside = [TokenSequence(token_ids=asked[0].token_ids, positions=np.array([200, 203, 310], dtype=np.int32))]

    def cached() -> float:
        return metric(teacher, "kdmesh_teacher_cached_tokens_total")

    with pool(teacher, 1, 3) as opened:
        before = cached()
        assert max(errors_of(opened.submit(asked).wait().rows_RD, model, asked, 1, 3)) < 1e-5
        assert cached() == before + 3 * len(prompt)
        assert max(errors_of(opened.submit(inside).wait().rows_RD, model, inside, 1, 3)) < 1e-5
        assert cached() == before + 3 * len(prompt) + 200


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_outputs_are_whole_where_two_processes_share_a_layer(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_moe", FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 32})
    path = tiny_models.path(family, num_hidden_layers=3)
    asked = sequences(33, 2, 200, 7, 150, seed=1)
    engine = {"tensor_parallel": 2}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), path, variables=CORES, engine=engine, slab=WIDE) as server,
        pool(server, 1, 2, 3) as opened,
        pool(server) as plain,
    ):
        pending = [opened.submit(asked), plain.submit(asked), opened.submit(asked[2:])]
        assert max(errors_of(pending[0].wait().rows_RD, path, asked, 1, 2, 3)) < 1e-5
        assert relative_error(pending[1].wait().rows_RD, hugging_face_rows(path, asked)) < 1e-5
        assert max(errors_of(pending[2].wait().rows_RD, path, asked[2:], 1, 2, 3)) < 1e-5


def test_copies_of_the_model_all_give_outputs_and_deterministic_ones_the_same_bits(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked = sequences(33, 2, 200, 7, 150, seed=1)
    engine = {"data_parallel": 2, "deterministic": True}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, variables=CORES, engine=engine, slab=WIDE) as server,
        pool(server, 1, 3) as opened,
        pool(server, 2) as others,
    ):
        quiet = opened.submit(asked).wait().rows_RD.clone()
        assert max(errors_of(quiet, model, asked, 1, 3)) < 1e-5
        pending = [each.submit(asked) for each in (others, opened, others, opened)]
        assert all(torch.equal(pending[n].wait().rows_RD, quiet) for n in (1, 3))
        assert max(errors_of(pending[2].wait().rows_RD, model, asked, 2)) < 1e-5


def test_outputs_in_bfloat16_are_hugging_faces_but_for_rounding(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_models.path("qwen3", num_hidden_layers=3, dtype=torch.bfloat16, initializer_range=0.02)
    asked = sequences(33, 2, 200, 7, 150, seed=1)
    with sglang_teacher(tmp_path_factory.mktemp("s"), path, slab=WIDE) as server, pool(server, 1, 2, 3) as opened:
        rows_RC = opened.submit(asked).wait().rows_RD
        assert rows_RC.dtype is torch.bfloat16
        assert max(errors_of(rows_RC, path, asked, 1, 2, 3)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_outputs_are_those_of_the_weights_that_came_last(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, tensor_parallel: int
) -> None:
    old, *newer = (tiny_models.path("qwen3", seed=seed, num_hidden_layers=3) for seed in range(3))
    asked = sequences(33, 2, 200, seed=1)
    engine = {"updatable": True, "tensor_parallel": tensor_parallel}
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel)))}
    with sglang_teacher(tmp_path_factory.mktemp("s"), old, variables=cores, engine=engine, slab=WIDE) as server:
        with pool(server, 1, 3) as opened:
            assert max(errors_of(opened.submit(asked).wait().rows_RD, old, asked, 1, 3)) < 1e-5
        for version, new in enumerate(newer, start=2):
            publish(server.grpc, student(new), version, service=TEACHERS)
            with pool(server, 1, 3) as opened:
                assert max(errors_of(opened.submit(asked).wait().rows_RD, new, asked, 1, 3)) < 1e-5


@pytest.mark.parametrize("family", ["granite", "llama", "gemma3_text"])
def test_outputs_of_layers_that_are_made_otherwise(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    path = tiny_models.path(family)
    asked = sequences(33, 2, 150, seed=1)
    with sglang_teacher(tmp_path_factory.mktemp("s"), path, slab=WIDE) as server, pool(server, 1, 2) as opened:
        assert max(errors_of(opened.submit(asked).wait().rows_RD, path, asked, 1, 2)) < 1e-5


def figures(directory: Path, begun: Path, address: str, *overrides: str, **sections: Any) -> list[tuple[float, float]]:
    """Loss and distance of layers, of every step of a job."""
    config = write_config(directory, student=begun, teacher=address, steps=6, **sections)
    (outcome,) = run_job(config, *overrides)
    assert outcome.exit_code == 0, outcome.errors
    return [(step["loss_nats_per_token"], step["layer_distance"]) for step in records(directory / "run", "step")]


@pytest.mark.timeout(400)
def test_a_job_learns_what_it_learns_from_a_teacher_in_transformers(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    begun = tiny_models.path("qwen3", seed=1)
    path = tiny_models.path("qwen3", seed=2, hidden_size=48, num_hidden_layers=4)
    compared = {"pairs": {1: 2, 2: 4}, "weight": 0.5, "distance": "mse"}

    def learnt_from(address: str) -> list[tuple[float, float]]:
        objective = {"name": "distill", "ce_weight": 0.2, "layers": compared}
        return figures(tmp_path_factory.mktemp("job"), begun, address, objective=objective)

    with serving_teacher(tmp_path_factory.mktemp("t"), path) as address:
        expected = learnt_from(address)
    with sglang_teacher(tmp_path_factory.mktemp("s"), path, slab=WIDE) as server:
        actual = learnt_from(server.grpc)
    assert len(actual) == len(expected) == 6
    assert np.allclose(actual, expected, rtol=1e-4, atol=0)
    assert expected[-1] < expected[0]


@pytest.mark.timeout(400)
def test_a_teacher_that_follows_the_student_has_its_layers_where_they_are_new(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    begun = tiny_models.path("qwen3", seed=1)
    layers = {"pairs": {1: 1, 2: 2}, "weight": 0.5, "distance": "mse"}
    with sglang_teacher(tmp_path_factory.mktemp("s"), begun, engine={"updatable": True}, slab=WIDE) as server:
        learnt = figures(
            tmp_path_factory.mktemp("job"),
            begun,
            server.grpc,
            "teacher.follows_student={every: 2}",
            objective={"name": "distill", "ce_weight": 1.0, "layers": layers},
            optimizer={"learning_rate": 0.01, "schedule": "constant"},
        )
    distances = [distance for _, distance in learnt]
    assert max(distances[0::2]) < 1e-9 < 1e-6 < min(distances[1::2])


def test_a_pipeline_gives_final_hidden_states_alone(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_models.path("qwen3")
    with sglang_teacher(tmp_path_factory.mktemp("s"), path, variables=CORES, engine={"pipeline_parallel": 2}) as server:
        with pool(server) as opened:
            assert opened.describe().num_layers == 0
        with pytest.raises(errors.ModelMismatch, match="gives final hidden states alone"):
            pool(server, 1)
