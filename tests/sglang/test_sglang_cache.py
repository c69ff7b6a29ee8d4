"""The cache of a server whose slots SGLang's processes write: the server's own process writes there too."""

from __future__ import annotations

import pytest
import torch

from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.reference_rows import hugging_face_rows
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import CHUNK_TOKENS, sglang_teacher, token_count
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang


def test_kept_and_computed_rows_share_a_slot(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_models.path("qwen3")
    lengths = (33, CHUNK_TOKENS + 9, 2, 70, 20)
    asked = random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=1)
    with (
        sglang_teacher(tmp_path_factory.mktemp("s"), model, cache={"memory_mib": 8}) as server,
        TeacherPool([server.grpc], job="test", door="shm", deadline_s=60) as pool,
    ):
        first = pool.submit([asked[1], asked[3]]).wait().rows_RD.clone()
        before = token_count(server)
        rows_RD = pool.submit(asked).wait().rows_RD.clone()
        assert token_count(server) - before == 33 + 2 + 20
        parts = torch.split(rows_RD, [sequence.num_rows for sequence in asked])
        assert torch.equal(torch.cat([parts[1], parts[3]]), first)
        torch.testing.assert_close(rows_RD, hugging_face_rows(model, asked), rtol=1e-4, atol=1e-4)
        assert torch.equal(pool.submit(asked).wait().rows_RD, rows_RD)
        assert token_count(server) - before == 33 + 2 + 20
