"""New weights reach a teacher's SGLang processes: rows and head are those of the new model, and never of two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.weights.doors import DoorChoice
from tests.support.reference_logprobs import student
from tests.support.reference_rows import hugging_face_rows
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import sglang_teacher
from tests.support.sglang_weights import failing_weights, publish
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

ASKED = random_sequences([33, 2, 200, 7, 150], vocabulary_size=VOCABULARY_SIZE, seed=1)


def is_of(address: str, model: Path, version: int) -> bool:
    """Whether rows and head are this model's, to the last bits of float32."""
    with TeacherPool([address], job="test", door="shm", deadline_s=60) as pool:
        rows_RD = pool.submit(ASKED).wait().rows_RD.clone()
        head, head_version = pool.head()
        head_VD = head.weight_VD.clone()
    assert head_version == version
    has_its_rows = torch.allclose(rows_RD, hugging_face_rows(model, ASKED), rtol=1e-4, atol=1e-4)
    has_its_head = torch.equal(head_VD, student(model).lm_head.weight)
    assert has_its_rows == has_its_head
    return has_its_rows


@pytest.mark.parametrize(("tensor_parallel", "is_tied"), [(1, True), (2, False)])
def test_rows_and_head_are_those_of_the_new_weights(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory, tensor_parallel: int, is_tied: bool
) -> None:
    models = [tiny_models.path("qwen3", seed=seed, tie_word_embeddings=is_tied) for seed in range(4)]
    engine = {"updatable": True, "tensor_parallel": tensor_parallel}
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel)))}
    doors: list[DoorChoice] = ["shm", "inline", "collective"]
    with sglang_teacher(tmp_path_factory.mktemp("s"), models[0], variables=cores, engine=engine) as teacher:
        assert is_of(teacher.grpc, models[0], 1)
        for version, door in enumerate(doors, start=2):
            old, new = models[version - 2], models[version - 1]
            with pytest.raises(ConnectionAbortedError):
                publish(teacher.grpc, student(new), version, weights=failing_weights, service=TEACHERS)
            assert is_of(teacher.grpc, old, version - 1)
            publish(teacher.grpc, student(new), version, door=door, service=TEACHERS)
            assert is_of(teacher.grpc, new, version)
            assert not is_of(teacher.grpc, old, version)
