"""Rows stay right when several scheduler processes share the work."""

from __future__ import annotations

import pytest
import torch

from kdmesh.rpc.teacher_pool import TeacherPool
from tests.support.reference_rows import hugging_face_rows
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import sglang_teacher
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

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
