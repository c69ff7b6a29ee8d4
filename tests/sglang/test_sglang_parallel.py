"""Rows stay right when several scheduler processes share the work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence
from tests.support.reference_rows import hugging_face_rows
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import metric, sglang_teacher
from tests.support.tiny_models import FAMILIES, VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # a list for each process


def test_tensor_parallel_rows_in_bfloat16_are_hugging_faces_but_for_rounding(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_models.path("qwen3", dtype=torch.bfloat16, initializer_range=0.02)
    asked = random_sequences([33, 2, 200, 7, 150], vocabulary_size=VOCABULARY_SIZE, seed=1)
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, variables=CORES, engine={"tensor_parallel": 2}) as teacher,
        TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        rows_RD = pool.submit(asked).wait().rows_RD
        expected_RD = hugging_face_rows(model, asked)
        assert rows_RD.dtype is expected_RD.dtype is torch.bfloat16
        one_rounding = torch.finfo(torch.bfloat16).eps * float(expected_RD.abs().max())
        assert float((rows_RD.float() - expected_RD.float()).abs().max()) <= one_rounding
        # Nor are they further from what float32 gives than Hugging Face's own are.
        exact_RD = hugging_face_rows(model, asked, dtype=torch.float32)
        assert (rows_RD.float() - exact_RD).norm() <= 1.1 * (expected_RD.float() - exact_RD).norm()


def test_data_parallel_copies_all_write_and_deterministic_rows_stay_the_same_bits(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_models.path("qwen3")
    asked = random_sequences([33, 2, 200, 7, 150], vocabulary_size=VOCABULARY_SIZE, seed=1)
    others = random_sequences([60, 11, 140], vocabulary_size=VOCABULARY_SIZE, seed=2)
    engine = {"data_parallel": 2, "deterministic": True}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, variables=CORES, engine=engine) as teacher,
        TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        assert pool.describe().is_deterministic
        quiet = pool.submit(asked).wait().rows_RD.clone()
        pending = [pool.submit(each) for each in ([others[0]], asked, others, asked[1:])]
        assert torch.equal(pending[1].wait().rows_RD, quiet)
        expected_RD = hugging_face_rows(model, asked)
        assert torch.allclose(quiet, expected_RD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_rows_of_a_pipeline_are_written_by_its_last_stage_and_are_hugging_faces(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, tensor_parallel: int
) -> None:
    model = tiny_models.path("qwen3", num_hidden_layers=3)
    asked = random_sequences([33, 2, 200, 7, 150], vocabulary_size=VOCABULARY_SIZE, seed=1)  # chunks have 128 tokens
    late = [TokenSequence(token_ids=asked[2].token_ids, positions=np.arange(170, 199, dtype=np.int32))]
    engine = {"pipeline_parallel": 2, "tensor_parallel": tensor_parallel}
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join("01" * tensor_parallel)}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, variables=cores, engine=engine) as teacher,
        TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        expected_RD = hugging_face_rows(model, asked)
        assert torch.allclose(pool.submit(asked).wait().rows_RD, expected_RD, rtol=1e-4, atol=1e-4)
        before = metric(teacher, "kdmesh_teacher_cached_tokens_total")
        together = [pool.submit(each) for each in (asked, late, asked[1:])]
        assert torch.allclose(together[0].wait().rows_RD, expected_RD, rtol=1e-4, atol=1e-4)
        assert torch.allclose(together[1].wait().rows_RD, hugging_face_rows(model, late), rtol=1e-4, atol=1e-4)
        assert metric(teacher, "kdmesh_teacher_cached_tokens_total") >= before + 170


def test_a_mixture_of_experts_that_two_processes_share_gives_hugging_faces_rows(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", mixture)
    model = tiny_models.path("qwen3_moe")
    asked = random_sequences([33, 2, 200, 7, 150], vocabulary_size=VOCABULARY_SIZE, seed=1)
    with (
        # Without expert_parallel: SGLang's kernel for mixtures on a CPU knows no expert of another process.
        sglang_teacher(tmp_path_factory.mktemp("s"), model, variables=CORES, engine={"tensor_parallel": 2}) as teacher,
        TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        rows_RD = pool.submit(asked).wait().rows_RD
        assert torch.allclose(rows_RD, hugging_face_rows(model, asked), rtol=1e-4, atol=1e-4)
