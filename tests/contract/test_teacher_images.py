"""A teacher that reads images: what travels, what comes back, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh.errors import EngineFailure, InvalidRequest
from kdmesh.images import describe_image
from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.teachers.client import TeacherClient
from kdmesh.rpc.teachers.session_options import SessionOptions
from kdmesh.types import PlacedImage, TokenSequence
from kdmesh_teacher.config import TeacherConfig
from kdmesh_teacher.config import TransformersEngine as TransformersEngineConfig
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.transformers_engine import TransformersEngine
from tests.support.reference_vision import hugging_face_vision_rows
from tests.support.teacher_server import served
from tests.support.tiny_models import TinyModels
from tests.support.tiny_vision import TinyVisionModels, png, reader_of, vision_sequence


@contextlib.asynccontextmanager
async def connected(
    model: Path,
    directory: Path,
    *,
    images: dict[str, Any] | None = None,
    engine: type[TransformersEngine] | None = None,
) -> AsyncIterator[TeacherClient]:
    config = TeacherConfig.model_validate(
        {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "max_batch_tokens": 512},
            "server": {"port": 0, "rest_port": 0},
            "slab": {"slots": 8, "slot_mib": 0.25},
            "images": images or {},
        }
    )
    assert isinstance(config.engine, TransformersEngineConfig)
    made = (engine or TransformersEngine)(config.engine)
    async with served(config, made, directory) as (addresses, _, _):
        client = await TeacherClient.connect(addresses.grpc, SessionOptions(job="test", door="stream"))
        try:
            yield client
        finally:
            await client.close()


def sent_images(client: TeacherClient, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the images of each message that the client will send."""
    sizes: list[int] = []
    put = client._put_images

    async def counted(images: Sequence[bytes], deadline: Deadline) -> None:
        sizes.extend(map(len, images))
        await put(images, deadline)

    monkeypatch.setattr(client, "_put_images", counted)
    return sizes


async def rows_of(client: TeacherClient, *sequences: TokenSequence) -> torch.Tensor:
    return (await client.prefill(sequences, Deadline.after(30))).rows_RD.clone()


async def test_rows_of_texts_and_images_together_equal_hugging_face(
    tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    path = tiny_vision.path()
    reader = reader_of(path)
    sequences = [
        vision_sequence(reader, 5, png(24, 40, seed=1), 9, png(90, 30, seed=2), 7, seed=1),
        vision_sequence(reader, 11, seed=2),
        vision_sequence(reader, 3, png(64, 64, seed=3), 6, seed=3),
    ]
    async with connected(path, tmp_path) as client:
        rows_RD = await rows_of(client, *sequences)
    torch.testing.assert_close(rows_RD, hugging_face_vision_rows(path, sequences), rtol=1e-4, atol=1e-4)


async def test_an_image_travels_once_and_again_when_the_server_has_lost_it(
    tiny_vision: TinyVisionModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_vision.path()
    reader = reader_of(path)
    first, second = png(200, 200, seed=1), png(200, 200, seed=2)
    one = vision_sequence(reader, 5, first, 9, seed=1)
    both = vision_sequence(reader, 5, first, 4, second, 9, seed=2)
    mib = 1.5 * len(first) / 2**20  # room for one of them
    async with connected(path, tmp_path) as client:
        sent = sent_images(client, monkeypatch)
        rows_RD = await rows_of(client, one)
        assert torch.equal(await rows_of(client, one), rows_RD)
        assert sent == [len(first)]
        await rows_of(client, both)
        assert sent == [len(first), len(second)]
    async with connected(path, tmp_path, images={"memory_mib": mib, "max_image_mib": mib}) as client:
        sent = sent_images(client, monkeypatch)
        again_RD = await rows_of(client, one)
        torch.testing.assert_close(again_RD, rows_RD)
        await rows_of(client, vision_sequence(reader, 5, second, 9, seed=3))  # the first makes place
        await rows_of(client, one)
        assert sent == [len(first), len(second), len(first)]


async def test_images_that_the_model_cannot_take_are_refused(tiny_vision: TinyVisionModels, tmp_path: Path) -> None:
    path = tiny_vision.path()
    reader = reader_of(path)
    sequence = vision_sequence(reader, 5, png(32, 32, seed=1), 9, seed=1)
    (placed,) = sequence.images
    shorter = replace(placed, num_tokens=placed.num_tokens - 1)
    fewer = replace(sequence, token_ids=sequence.token_ids.copy(), images=(shorter,))
    fewer.token_ids[shorter.end] = 0
    opened_otherwise = replace(sequence, token_ids=sequence.token_ids.copy())
    opened_otherwise.token_ids[placed.first_token - 1] = 9
    wide = vision_sequence(reader, 5, png(100, 50, seed=1), 9, seed=1)
    async with connected(path, tmp_path, images={"max_image_pixels": 4000}) as client:
        with pytest.raises(InvalidRequest, match=r"15 tokens for an image of 32 x 32 pixels.* makes 16"):
            await rows_of(client, fewer)
        with pytest.raises(InvalidRequest, match=r"sequence 0 has token \d+ before an image; it must be 3"):
            await rows_of(client, opened_otherwise)
        with pytest.raises(InvalidRequest, match=r"has 16 image tokens .* 15 of them belong"):
            await rows_of(client, replace(sequence, images=(shorter,)))
        with pytest.raises(InvalidRequest, match=r"has 16 image tokens .* 0 of them belong"):
            await rows_of(client, replace(sequence, images=()))
        with pytest.raises(InvalidRequest, match="100 x 50 pixels; the most allowed is 4000"):
            await rows_of(client, wide)
        whole = png(32, 32, seed=1)
        with pytest.raises(InvalidRequest, match="is damaged"):
            await client._put_images([whole[:99] + bytes(40) + whole[139:]], Deadline.after(10))
        with pytest.raises(InvalidRequest, match="of 32 x 32 pixels that is cut short"):
            await client._put_images([whole[:-40]], Deadline.after(10))
        with pytest.raises(InvalidRequest, match="are not an image"):
            await client._put_images([b"GIF89a"], Deadline.after(10))


async def test_a_teacher_that_reads_text_alone_refuses_images(
    tiny_models: TinyModels, tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    sequence = vision_sequence(reader_of(tiny_vision.path()), 5, png(32, 32, seed=1), 9, seed=1)
    async with connected(tiny_models.path(), tmp_path) as client:
        assert client.model.vision is None
        with pytest.raises(InvalidRequest, match="sequence 0 has 1 images; this model reads none"):
            await rows_of(client, sequence)
        with pytest.raises(InvalidRequest, match="reads no images"):
            await client._put_images([png(32, 32, seed=1)], Deadline.after(10))


class Blind(TransformersEngine):
    """Shows its model the same grey picture, whatever it is asked about."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """As the engine, of other images."""
        super().prefill([replace(job, sequences=tuple(map(_blinded, job.sequences))) for job in jobs])


def _blinded(sequence: TokenSequence) -> TokenSequence:
    return replace(sequence, images=tuple(map(_grey, sequence.images)))


def _grey(placed: PlacedImage) -> PlacedImage:
    assert placed.image is not None
    return replace(placed, image=describe_image(png(placed.image.width, placed.image.height, seed=9)))


async def test_a_teacher_that_does_not_see_its_images_is_never_ready(
    tiny_vision: TinyVisionModels, tmp_path: Path
) -> None:
    with pytest.raises(EngineFailure, match="does not see its images"):
        async with connected(tiny_vision.path(), tmp_path, engine=Blind):
            pass
