"""Rows that SGLang's scheduler process writes into shared memory are Hugging Face's own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence
from tests.support.reference_rows import hugging_face_rows
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import CHUNK_TOKENS, metric, sglang_environment, sglang_teacher
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

LIMIT = 1024


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models.path("qwen3", max_position_embeddings=LIMIT)


@pytest.fixture(scope="module")
def teacher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with sglang_teacher(tmp_path_factory.mktemp("s"), model) as server:
        yield server


@pytest.fixture
def pool(teacher: TeacherProcess) -> Iterator[TeacherPool]:
    with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as opened:
        yield opened


def sequences(*lengths: int, seed: int) -> list[TokenSequence]:
    return random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed)


def rows(pool: TeacherPool, asked: Sequence[TokenSequence]) -> Tensor:
    return pool.submit(asked).wait().rows_RD.clone()


def all_positions(ids: np.ndarray, first: int = 0) -> TokenSequence:
    return TokenSequence(token_ids=ids, positions=np.arange(first, len(ids) - 1, dtype=np.int32))


def cached(teacher: TeacherProcess) -> float:
    return metric(teacher, "kdmesh_teacher_cached_tokens_total")


def test_rows_equal_hugging_face(pool: TeacherPool, model: Path) -> None:
    asked = sequences(33, 2, 70, 7, 20, seed=1)
    assert relative_error(rows(pool, asked), hugging_face_rows(model, asked)) < 1e-5


def test_many_requests_at_once_get_their_own_rows(pool: TeacherPool, model: Path) -> None:
    asked = [sequences(40 + n, 9, seed=100 + n) for n in range(24)]  # more than there are slots
    pending = [pool.submit(each) for each in asked]
    for each, answer in zip(asked, pending, strict=True):
        assert relative_error(answer.wait().rows_RD, hugging_face_rows(model, each)) < 1e-5


@pytest.mark.parametrize("length", [CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS, 5 * CHUNK_TOKENS - 3])
def test_prompt_longer_than_a_chunk_gets_all_its_rows(pool: TeacherPool, model: Path, length: int) -> None:
    asked = sequences(length, 20, length, seed=length)
    assert relative_error(rows(pool, asked), hugging_face_rows(model, asked)) < 1e-5


def test_longest_sequence_is_taken_and_a_longer_one_refused(pool: TeacherPool, model: Path) -> None:
    longest = pool.describe().max_sequence_tokens
    assert LIMIT - 16 < longest <= LIMIT
    asked = sequences(longest, seed=5)
    assert relative_error(rows(pool, asked), hugging_face_rows(model, asked)) < 1e-5


def test_longest_sequence_is_taken_where_pages_of_a_cache_shorter_than_the_model_limit_it(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pages = {"arguments": {"max_total_tokens": LIMIT // 2, "page_size": 64}}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, engine=pages) as server,
        TeacherPool([server.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        longest = pool.describe().max_sequence_tokens
        assert longest > LIMIT // 2 - 3 * 64
        for length in (longest, longest - 60):
            asked = sequences(length, seed=5)
            assert relative_error(rows(pool, asked), hugging_face_rows(model, asked)) < 1e-5


def test_sequences_that_share_a_prompt_prefill_it_once(teacher: TeacherProcess, pool: TeacherPool, model: Path) -> None:
    random = np.random.default_rng(3)
    prompt = random.integers(0, VOCABULARY_SIZE, 300, dtype=np.int32)
    asked = [
        all_positions(np.concatenate([prompt, random.integers(0, VOCABULARY_SIZE, 20 + n, dtype=np.int32)]), first=300)
        for n in range(6)
    ]
    before = cached(teacher)
    together = rows(pool, asked[:4])
    assert cached(teacher) - before == 3 * len(prompt)
    later = rows(pool, asked[4:])
    assert cached(teacher) - before == 5 * len(prompt)
    assert relative_error(torch.cat([together, later]), hugging_face_rows(model, asked)) < 1e-5


def test_positions_inside_a_cached_prefix_get_their_rows(
    teacher: TeacherProcess, pool: TeacherPool, model: Path
) -> None:
    ids = np.random.default_rng(4).integers(0, VOCABULARY_SIZE, 280, dtype=np.int32)
    whole = all_positions(ids)
    first = rows(pool, [whole])
    before = cached(teacher)
    assert torch.equal(rows(pool, [whole]), first)
    assert cached(teacher) == before  # the first row is wanted, so nothing of it may come out of the cache
    tail = TokenSequence(token_ids=ids, positions=np.array([200, 203, 270], dtype=np.int32))
    assert relative_error(rows(pool, [tail]), hugging_face_rows(model, [tail])) < 1e-5
    assert cached(teacher) == before + 200


_HOLD_ROWS = """
import sys, time
import numpy as np
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import TokenSequence
sequence = TokenSequence(token_ids=np.arange(9, dtype=np.int32), positions=np.arange(8, dtype=np.int32))
pool = TeacherPool([sys.argv[1]], job="held", door="shm", move_after_s=1000)
rows = pool.submit([sequence]).wait()
print("held", flush=True)
time.sleep(1000)
"""


def test_slot_that_got_other_memory_is_written_as_the_first_was(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    slab = {"slots": 1, "slots_per_session": 1, "lease_s": 1}
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, slab=slab) as server,
        subprocess.Popen(
            [sys.executable, "-c", _HOLD_ROWS, server.grpc], stdout=subprocess.PIPE, env=sglang_environment()
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)  # alive, and silent from now on
        asked = sequences(33, 70, seed=8)
        with TeacherPool([server.grpc], job="test", door="shm", deadline_s=30) as pool:
            assert relative_error(rows(pool, asked), hugging_face_rows(model, asked)) < 1e-5
        assert metric(server, "kdmesh_teacher_orphans") == 1
        holder.kill()


def test_head_is_the_models_own(pool: TeacherPool, model: Path) -> None:
    head, _ = pool.head()
    expected = AutoModelForCausalLM.from_pretrained(model, dtype="auto").get_output_embeddings().weight
    assert torch.equal(head.weight_VD, expected)
