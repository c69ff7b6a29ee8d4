"""Rows and heads that come through the service give Hugging Face's own hidden states and logits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.models.fingerprint import architecture_fingerprint, named_weights
from kdmesh.models.placement import DTYPES
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.doors import DoorChoice
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.rpc.weights.services import TEACHERS
from kdmesh.types import EVERY_TAG, TokenSequence
from kdmesh.weights.manifest import TensorSpec
from kdmesh_teacher.build import build_engine
from kdmesh_teacher.config import TeacherConfig
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.teacher_server import served
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

LENGTHS = (33, 2, 70, 7, 20)


def asked() -> list[TokenSequence]:
    return random_sequences(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=0)


@asynccontextmanager
async def connected(model: Path, directory: Path, door: DoorChoice, **engine: Any) -> AsyncIterator[TeacherClient]:
    config = TeacherConfig.model_validate(
        {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "max_batch_tokens": 256} | engine,
            "server": {"port": 0, "rest_port": 0},
            "slab": {"slots": 8, "slot_mib": 0.25},
        }
    )
    async with served(config, build_engine(config.engine), directory) as (addresses, _, _):
        client = await TeacherClient.connect(addresses.grpc, SessionOptions(job="test", door=door))
        try:
            yield client
        finally:
            await client.close()


def hugging_face(path: Path, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """[R, D] last hidden states after the final norm, and [R, V] logits."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
    hidden, logits = [], []
    with torch.no_grad():
        for sequence in sequences:
            ids_1T = torch.from_numpy(sequence.token_ids).long()[None]
            out = model(input_ids=ids_1T, output_hidden_states=True)
            positions_R = torch.from_numpy(sequence.positions).long()
            hidden.append(out.hidden_states[-1][0][positions_R])
            logits.append(out.logits[0][positions_R])
    return torch.cat(hidden), torch.cat(logits)


@pytest.mark.parametrize("door", ["shm", "stream"])
async def test_rows_equal_hugging_face_together_and_alone(
    tiny_models: TinyModels, tmp_path: Path, door: DoorChoice
) -> None:
    path = tiny_models.path("qwen3")
    expected_RD, _ = hugging_face(path, asked())
    async with connected(path, tmp_path, door) as client:
        together = await client.prefill(asked(), Deadline.after(20))
        assert relative_error(together.rows_RD, expected_RD) < 1e-5
        alone = await asyncio.gather(*(client.prefill([s], Deadline.after(20)) for s in asked()))
        assert relative_error(torch.cat([rows.rows_RD for rows in alone]), expected_RD) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite", "phi"])
async def test_logits_from_rows_and_head_are_the_models_own(
    tiny_models: TinyModels, tmp_path: Path, family: str
) -> None:
    path = tiny_models.path(family)
    _, expected_RV = hugging_face(path, asked())
    async with connected(path, tmp_path, "shm") as client:
        rows = await client.prefill(asked(), Deadline.after(20))
        head, _ = await client.head()
        logits_RV = head.sliced(client.model.head.vocabulary_size).logits(rows.rows_RD)
        assert relative_error(logits_RV, expected_RV[:, : client.model.head.vocabulary_size]) < 1e-5


async def test_deterministic_rows_do_not_depend_on_what_else_is_served(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("qwen3")
    async with connected(path, tmp_path, "stream", deterministic=True) as client:
        assert client.model.is_deterministic
        quiet = await client.prefill(asked(), Deadline.after(20))
        others = random_sequences([11, 60, 5, 44] * 5, vocabulary_size=VOCABULARY_SIZE, seed=9)
        busy, *_ = await asyncio.gather(
            client.prefill(asked(), Deadline.after(20)),
            *(client.prefill([other], Deadline.after(20)) for other in others),
        )
        assert torch.equal(busy.rows_RD, quiet.rows_RD)


async def test_bfloat16_model_answers_bfloat16(tiny_models: TinyModels, tmp_path: Path) -> None:
    path = tiny_models.path("qwen3", dtype=torch.bfloat16)
    async with connected(path, tmp_path, "shm") as client:
        rows = await client.prefill(asked(), Deadline.after(20))
        head, _ = await client.head()
        assert rows.rows_RD.dtype is head.weight_VD.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3", torch.float32), ("gemma2", torch.bfloat16), ("phi", torch.float32)]
)
async def test_replaced_weights_give_the_bits_of_a_server_that_was_started_with_them(
    tiny_models: TinyModels, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    new = tiny_models.path(family, seed=1, dtype=dtype)

    async def answers(client: TeacherClient) -> list[Tensor]:
        rows = await client.prefill(asked(), Deadline.after(20))
        head, version = await client.head()
        assert rows.weight_version == version
        return [tensor.clone() for tensor in (rows.rows_RD, head.weight_VD, head.bias_V) if tensor is not None]

    (tmp_path / "fresh").mkdir()
    async with connected(new, tmp_path / "fresh", "shm", deterministic=True) as fresh:
        expected = await answers(fresh)
    old = tiny_models.path(family, dtype=dtype)
    async with connected(old, tmp_path, "shm", deterministic=True, updatable=True) as client:
        assert not torch.equal((await answers(client))[0], expected[0])
        await client.sleep(EVERY_TAG, drain_s=5)  # the parameters get other memory
        await client.wake(EVERY_TAG)
        await asyncio.to_thread(send, client.address, new)
        for tensor, wanted in zip(await answers(client), expected, strict=True):
            assert torch.equal(tensor, wanted)


def send(address: str, path: Path) -> None:
    """The weights in a directory, to a server."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    weights = [
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DTYPES[tensor.dtype]), partial(_itself, tensor))
        for name, tensor in named_weights(model).items()
    ]
    with WeightSender([address], service=TEACHERS, bucket_bytes=2**14, deadline_s=20) as sender:
        sender.publish(2, architecture_fingerprint(model), weights)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
