"""A teacher whose real SGLang reads images gives Hugging Face's own rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdmesh.errors import InvalidRequest
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.services import TEACHERS
from tests.support.reference_logprobs import student
from tests.support.reference_vision import hugging_face_vision_rows
from tests.support.relative_error import relative_error
from tests.support.sglang_teachers import CHUNK_TOKENS, metric, sglang_teacher
from tests.support.sglang_weights import publish
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def model(tiny_vision: TinyVisionModels) -> Path:
    return tiny_vision.path(max_pixels=2**18, patch=14)


@pytest.fixture(scope="module")
def teacher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_teacher(tmp_path_factory.mktemp("s"), model) as server:
        yield server


@pytest.fixture
def pool(teacher: TeacherProcess) -> Iterator[TeacherPool]:
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as opened:
        yield opened


def test_rows_of_texts_and_images_together_equal_hugging_face(pool: TeacherPool, model: Path) -> None:
    reader = reader_of(model)
    asked = [
        vision_sequence(reader, 5, png(60, 90, seed=1), 9, png(200, 80, seed=2), 7, seed=1),
        vision_sequence(reader, 11, seed=2),
        vision_sequence(reader, 3, png(112, 112, seed=3), 6, seed=3),
    ]
    rows_RD = pool.submit(asked).wait().rows_RD
    assert relative_error(rows_RD, hugging_face_vision_rows(model, asked)) < 1e-4


def test_an_image_longer_than_a_chunk_gets_its_rows(pool: TeacherPool, model: Path) -> None:
    reader = reader_of(model)
    asked = [vision_sequence(reader, 9, png(420, 308, seed=4), 9, seed=4, rows=8)]
    assert asked[0].images[0].num_tokens > CHUNK_TOKENS
    rows_RD = pool.submit(asked).wait().rows_RD
    assert relative_error(rows_RD, hugging_face_vision_rows(model, asked)) < 1e-4


def test_outputs_of_layers_behind_images_equal_hugging_face(teacher: TeacherProcess, model: Path) -> None:
    reader = reader_of(model)
    asked = [
        vision_sequence(reader, 5, png(60, 90, seed=1), 9, seed=1),
        vision_sequence(reader, 11, seed=2),
    ]
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60, layers=(1, 2)) as opened:
        rows_RC = opened.submit(asked).wait().rows_RD
        expected_RC = hugging_face_vision_rows(model, asked, layers=(1, 2))
        for own_RD, expected_RD in zip(rows_RC.chunk(3, 1), expected_RC.chunk(3, 1), strict=True):
            assert relative_error(own_RD, expected_RD) < 1e-4


def test_the_same_text_after_another_image_is_not_taken_from_the_cache(
    teacher: TeacherProcess, pool: TeacherPool, model: Path
) -> None:
    reader = reader_of(model)
    pictures = (png(112, 112, seed=5), png(112, 112, seed=6), png(112, 112, seed=5))
    answers = []
    for picture in pictures:
        asked = [vision_sequence(reader, 40, picture, 9, seed=7)]
        before = metric(teacher, "kdmesh_teacher_cached_tokens_total")
        rows_RD = pool.submit(asked).wait().rows_RD.clone()
        assert relative_error(rows_RD, hugging_face_vision_rows(model, asked)) < 1e-4
        answers.append((rows_RD, metric(teacher, "kdmesh_teacher_cached_tokens_total") - before))
    assert not torch.allclose(answers[0][0], answers[1][0], atol=0.05)
    assert answers[1][1] < answers[2][1]  # the second shares its text before the image, the third its image too


def test_an_image_token_without_an_image_is_refused(pool: TeacherPool, model: Path) -> None:
    asked = vision_sequence(reader_of(model), 9, seed=8)
    asked.token_ids[2] = reader_of(model).token_id
    with pytest.raises(InvalidRequest, match="has 1 image tokens"):
        pool.submit([asked]).wait()


def test_new_weights_see_the_same_image_otherwise(
    model: Path, tiny_vision: TinyVisionModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tiny_vision.path(seed=3, max_pixels=2**18, patch=14)
    asked = [vision_sequence(reader_of(model), 5, png(60, 90, seed=1), 9, seed=1)]
    with sglang_teacher(tmp_path_factory.mktemp("s"), model, engine={"updatable": True}) as server:
        for version, path in enumerate((model, other, model), start=1):
            if version > 1:
                publish(server.grpc, student(path), version, service=TEACHERS)
            with TeacherPool([server.grpc], job="test", door="shm", deadline_s=60) as pool:
                rows_RD = pool.submit(asked).wait().rows_RD
                head, head_version = pool.head()
                assert head_version == version
                assert torch.equal(head.weight_VD, student(path).get_output_embeddings().weight)
            assert relative_error(rows_RD, hugging_face_vision_rows(path, asked)) < 1e-4
