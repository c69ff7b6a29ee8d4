"""Translates between protobuf messages and our types; everything on the wire is checked here."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.handles.rdma.agent import RemoteMemory
from kdmesh.rpc.wire_enum import WireEnum
from kdmesh.types import (
    CacheAnswer,
    DType,
    Handle,
    HeadSpec,
    ModelDescription,
    PlacedImage,
    ServerLoad,
    TokenSequence,
    VisionSpec,
)
from kdmesh.v1 import common_pb2, teacher_pb2

DTYPES = WireEnum(
    "dtype",
    {
        DType.FLOAT32: common_pb2.DTYPE_FLOAT32,
        DType.BFLOAT16: common_pb2.DTYPE_BFLOAT16,
        DType.FLOAT16: common_pb2.DTYPE_FLOAT16,
    },
)
_MAX_ID = 2**31 - 1


def sequences_from_wire(messages: Iterable[common_pb2.TokenSequence]) -> tuple[TokenSequence, ...]:
    """Raises InvalidRequest when a sequence is not one."""
    return tuple(
        TokenSequence(
            token_ids=int32_from_wire(m.token_ids, "token id"),
            positions=int32_from_wire(m.positions, "position"),
            images=images_from_wire(m.images),
        )
        for m in messages
    )


def sequences_to_wire(sequences: Iterable[TokenSequence]) -> list[common_pb2.TokenSequence]:
    """The same sequences as messages."""
    return [
        common_pb2.TokenSequence(
            token_ids=s.token_ids.tolist(), positions=s.positions.tolist(), images=images_to_wire(s.images)
        )
        for s in sequences
    ]


def images_from_wire(messages: Iterable[common_pb2.PlacedImage]) -> tuple[PlacedImage, ...]:
    """Raises InvalidRequest when one is not where an image can be."""
    return tuple(
        PlacedImage(digest=m.digest, first_token=m.first_token, num_tokens=m.num_tokens, image=None) for m in messages
    )


def images_to_wire(images: Iterable[PlacedImage]) -> list[common_pb2.PlacedImage]:
    """The same places as messages; the images themselves stay here."""
    return [common_pb2.PlacedImage(digest=i.digest, first_token=i.first_token, num_tokens=i.num_tokens) for i in images]


def handle_from_wire(m: common_pb2.Handle) -> Handle:
    """Raises InvalidRequest when a field is out of range."""
    if len(m.token) != 16:
        raise InvalidRequest(f"a handle's token has {len(m.token)} bytes; it must have 16")
    if m.rows == 0 or m.cols == 0:
        raise InvalidRequest(f"a handle of {m.rows} x {m.cols} elements; both must be at least 1")
    if m.offset_bytes % 64:
        raise InvalidRequest(f"a handle's offset_bytes is {m.offset_bytes}; it must be a multiple of 64")
    return Handle(
        segment=m.segment,
        epoch=m.epoch,
        token=m.token,
        offset_bytes=m.offset_bytes,
        rows=m.rows,
        cols=m.cols,
        dtype=DTYPES.from_wire(m.dtype),
        is_claimed=m.is_claimed,
    )


def handle_to_wire(handle: Handle) -> common_pb2.Handle:
    """The same handle as a message."""
    return common_pb2.Handle(
        segment=handle.segment,
        epoch=handle.epoch,
        token=handle.token,
        offset_bytes=handle.offset_bytes,
        rows=handle.rows,
        cols=handle.cols,
        dtype=DTYPES.to_wire(handle.dtype),
        is_claimed=handle.is_claimed,
    )


def memory_from_wire(m: teacher_pb2.LocateMemoryResponse) -> RemoteMemory:
    """The metadata stays unread: only NIXL can. Raises Unavailable when it came damaged."""
    memory = RemoteMemory(agent=m.agent, metadata=m.metadata, address=m.address, size_bytes=m.size_bytes)
    if m.digest != memory.digest():
        raise Unavailable(f"{len(m.metadata)} bytes of RDMA metadata came with a wrong digest", retry_after_s=0.0)
    return memory


def memory_to_wire(memory: RemoteMemory) -> teacher_pb2.LocateMemoryResponse:
    """The same memory as a message."""
    return teacher_pb2.LocateMemoryResponse(
        agent=memory.agent,
        metadata=memory.metadata,
        address=memory.address,
        size_bytes=memory.size_bytes,
        digest=memory.digest(),
    )


def head_from_wire(m: teacher_pb2.HeadSpec) -> HeadSpec:
    """Raises InvalidRequest when the sizes or factors are impossible."""
    softcap = m.logit_softcap if m.HasField("logit_softcap") else None
    is_scaled = math.isfinite(m.logit_scale) and m.logit_scale != 0
    if not is_scaled or (softcap is not None and not 0 < softcap < math.inf):
        raise InvalidRequest(f"a head with logit_scale {m.logit_scale} and logit_softcap {softcap}")
    if not 0 < m.vocabulary_size <= m.padded_vocabulary_size:
        raise InvalidRequest(
            f"a head with vocabulary_size {m.vocabulary_size} and padded_vocabulary_size {m.padded_vocabulary_size}"
        )
    return HeadSpec(
        logit_scale=m.logit_scale,
        logit_softcap=softcap,
        vocabulary_size=m.vocabulary_size,
        padded_vocabulary_size=m.padded_vocabulary_size,
        has_bias=m.has_bias,
    )


def head_to_wire(head: HeadSpec) -> teacher_pb2.HeadSpec:
    """The same head as a message."""
    return teacher_pb2.HeadSpec(
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        vocabulary_size=head.vocabulary_size,
        padded_vocabulary_size=head.padded_vocabulary_size,
        has_bias=head.has_bias,
    )


def description_from_wire(m: teacher_pb2.DescribeResponse) -> ModelDescription:
    """Raises InvalidRequest when the description is impossible."""
    if m.hidden_size == 0:
        raise InvalidRequest("a model with hidden_size 0")
    return ModelDescription(
        name=m.model_name,
        model_fingerprint=m.model_fingerprint,
        tokenizer_fingerprint=m.tokenizer_fingerprint,
        hidden_size=m.hidden_size,
        dtype=DTYPES.from_wire(m.dtype),
        head=head_from_wire(m.head),
        weight_version=m.weight_version,
        max_sequence_tokens=m.max_sequence_tokens,
        max_request_tokens=m.max_request_tokens,
        max_request_rows=m.max_request_rows,
        is_deterministic=m.is_deterministic,
        architecture_fingerprint=m.architecture_fingerprint,
        vision=vision_from_wire(m.vision) if m.HasField("vision") else None,
        num_layers=m.num_layers,
    )


def description_to_wire(model: ModelDescription) -> teacher_pb2.DescribeResponse:
    """The same description as a message."""
    return teacher_pb2.DescribeResponse(
        model_name=model.name,
        model_fingerprint=model.model_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        hidden_size=model.hidden_size,
        dtype=DTYPES.to_wire(model.dtype),
        head=head_to_wire(model.head),
        weight_version=model.weight_version,
        max_sequence_tokens=model.max_sequence_tokens,
        max_request_tokens=model.max_request_tokens,
        max_request_rows=model.max_request_rows,
        is_deterministic=model.is_deterministic,
        architecture_fingerprint=model.architecture_fingerprint,
        vision=None if model.vision is None else vision_to_wire(model.vision),
        num_layers=model.num_layers,
    )


def vision_from_wire(m: common_pb2.VisionSpec) -> VisionSpec:
    """Raises InvalidRequest when no image would be allowed."""
    if not (m.max_image_bytes and m.max_image_pixels):
        raise InvalidRequest(f"a model that reads images of {m.max_image_bytes} bytes, {m.max_image_pixels} pixels")
    return VisionSpec(
        image_token_id=m.image_token_id,
        expansion=m.expansion,
        max_image_bytes=m.max_image_bytes,
        max_image_pixels=m.max_image_pixels,
    )


def vision_to_wire(vision: VisionSpec) -> common_pb2.VisionSpec:
    """The same as a message."""
    return common_pb2.VisionSpec(
        image_token_id=vision.image_token_id,
        expansion=vision.expansion,
        max_image_bytes=vision.max_image_bytes,
        max_image_pixels=vision.max_image_pixels,
    )


def int32_from_wire(values: Iterable[int], what: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """[n] of unsigned numbers. Raises InvalidRequest when one is too large; `what` names them."""
    wide = np.fromiter(values, dtype=np.int64)
    if len(wide) and wide.max() > _MAX_ID:
        raise InvalidRequest(f"{what} {wide.max()} exceeds {_MAX_ID}")
    return wide.astype(np.int32)


def load_from_wire(m: teacher_pb2.ServerLoad) -> ServerLoad:
    """What the server has to do; a speed that is none counts as not measured."""
    has_speed = m.HasField("tokens_per_s") and 0 < m.tokens_per_s < math.inf
    return ServerLoad(
        waiting_tokens=m.waiting_tokens,
        tokens_per_s=m.tokens_per_s if has_speed else None,
        recent_tokens=m.recent_tokens,
    )


def load_to_wire(load: ServerLoad) -> teacher_pb2.ServerLoad:
    """The same as a message."""
    return teacher_pb2.ServerLoad(
        waiting_tokens=load.waiting_tokens, tokens_per_s=load.tokens_per_s, recent_tokens=round(load.recent_tokens)
    )


def cache_answer_to_wire(answer: CacheAnswer) -> teacher_pb2.FindCachedResponse:
    """The same answer as a message."""
    return teacher_pb2.FindCachedResponse(
        is_kept=answer.is_kept,
        budget_bytes=answer.budget_bytes,
        entry_bytes=answer.entry_bytes,
        tokens_per_s=answer.tokens_per_s or 0.0,
    )


def cache_answer_from_wire(m: teacher_pb2.FindCachedResponse, *, num_sequences: int) -> CacheAnswer:
    """Raises InvalidRequest when it is not an answer to so many sequences."""
    if len(m.is_kept) != num_sequences:
        raise InvalidRequest(f"an answer for {len(m.is_kept)} sequences; asked for were {num_sequences}")
    return CacheAnswer(
        is_kept=tuple(m.is_kept),
        budget_bytes=m.budget_bytes,
        entry_bytes=m.entry_bytes,
        tokens_per_s=m.tokens_per_s or None,
    )
