"""Two machines, here two servers on one, share a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.free_port import free_port
from tests.support.reference_rows import hugging_face_rows
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import starting
from tests.support.teacher_process import await_ready, wait_event
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang


def test_a_model_over_two_nodes_gives_the_same_rows_and_ends_with_either(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model: Path = tiny_models.path("qwen3")
    shared = {"tensor_parallel": 2, "num_nodes": 2, "dist_init_address": f"127.0.0.1:{free_port()}"}
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    first, second = (
        starting(tmp_path_factory.mktemp("s"), model, variables=cores, engine=shared | {"node_rank": rank})
        for rank in (0, 1)
    )
    with first as answering, second as following:
        wait_event(following, "listening")
        teacher = await_ready(answering)
        asked = random_sequences([33, 2, 200], vocabulary_size=VOCABULARY_SIZE, seed=1)
        with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool:
            rows_RD = pool.submit(asked).wait().rows_RD
            expected_RD = hugging_face_rows(model, asked)
            assert (rows_RD - expected_RD).norm() < 1e-5 * expected_RD.norm()
        assert following.poll() is None
        answering.kill()
        _, errors = following.communicate(timeout=60)
        assert following.returncode != 0, errors
