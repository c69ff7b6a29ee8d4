"""Types survive the wire, and what is impossible does not get past it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.errors import InvalidRequest, Unavailable
from kdmesh.handles.rdma.agent import RemoteMemory
from kdmesh.rpc import codec
from kdmesh.types import DType, Handle, HeadSpec, ModelDescription, TokenSequence
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb

HANDLE = Handle(segment=3, epoch=7, token=b"t" * 16, offset_bytes=64, rows=5, cols=8, dtype=DType.BFLOAT16)
HEAD = HeadSpec(logit_scale=0.25, logit_softcap=30.0, vocabulary_size=60, padded_vocabulary_size=64, has_bias=True)
MODEL = ModelDescription(
    name="m",
    model_fingerprint="aa",
    tokenizer_fingerprint="bb",
    hidden_size=8,
    dtype=DType.FLOAT16,
    head=HEAD,
    weight_version=1,
    max_sequence_tokens=100,
    max_request_tokens=200,
    max_request_rows=300,
    is_deterministic=True,
    architecture_fingerprint="ffff",
    num_layers=5,
)


@st.composite
def sequences(draw: st.DrawFn) -> TokenSequence:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20))
    positions = draw(st.sets(st.integers(0, len(ids) - 2), min_size=1))
    return TokenSequence(token_ids=np.array(ids, np.int32), positions=np.array(sorted(positions), np.int32))


@given(st.lists(sequences(), max_size=4))
def test_sequences_survive(asked: list[TokenSequence]) -> None:
    request = pb.PrefillRequest(sequences=codec.sequences_to_wire(asked))
    got = codec.sequences_from_wire(pb.PrefillRequest.FromString(request.SerializeToString()).sequences)
    assert len(got) == len(asked)
    for one, other in zip(asked, got, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.positions, other.positions)
        assert other.token_ids.dtype == other.positions.dtype == np.int32


@pytest.mark.parametrize("dtype", list(DType))
def test_handle_survives(dtype: DType) -> None:
    handle = replace(HANDLE, dtype=dtype)
    assert codec.handle_from_wire(codec.handle_to_wire(handle)) == handle


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_description_survives(softcap: float | None) -> None:
    model = replace(MODEL, head=replace(HEAD, logit_softcap=softcap))
    assert codec.description_from_wire(codec.description_to_wire(model)) == model


@given(st.binary(max_size=120))
def test_garbage_decodes_to_valid_sequences_or_is_refused(data: bytes) -> None:
    try:
        request = pb.PrefillRequest.FromString(data)
        got = codec.sequences_from_wire(request.sequences)
    except (DecodeError, InvalidRequest):
        return
    for sequence in got:  # the constructor has checked; this says what that means
        assert sequence.token_ids.min() >= 0
        assert 0 <= sequence.positions[0] <= sequence.positions[-1] <= sequence.num_tokens - 2


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=6),
    st.lists(st.integers(0, 2**32 - 1), max_size=6),
)
def test_any_numbers_decode_to_a_valid_sequence_or_are_refused(ids: list[int], positions: list[int]) -> None:
    message = common_pb2.TokenSequence(token_ids=ids, positions=positions)
    try:
        (sequence,) = codec.sequences_from_wire([message])
    except InvalidRequest:
        return
    assert sequence.token_ids.tolist() == ids
    assert sequence.positions.tolist() == positions


@given(st.binary(max_size=80))
def test_garbage_decodes_to_a_valid_handle_or_is_refused(data: bytes) -> None:
    try:
        handle = codec.handle_from_wire(common_pb2.Handle.FromString(data))
    except (DecodeError, InvalidRequest):
        return
    assert len(handle.token) == 16
    assert handle.size_bytes > 0
    assert handle.offset_bytes % 64 == 0


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("token", b"short", "token has 5 bytes; it must have 16"),
        ("rows", 0, "0 x 8 elements"),
        ("cols", 0, "5 x 0 elements"),
        ("offset_bytes", 63, "offset_bytes is 63"),
        ("dtype", 0, "unknown dtype 0; known: float32, bfloat16, float16"),
        ("dtype", 77, "unknown dtype 77"),
    ],
)
def test_impossible_handles_are_refused(field: str, value: object, sentence: str) -> None:
    message = codec.handle_to_wire(HANDLE)
    setattr(message, field, value)
    with pytest.raises(InvalidRequest, match=sentence):
        codec.handle_from_wire(message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_scale", 0),
        ("logit_scale", float("nan")),
        ("logit_scale", float("inf")),
        ("logit_softcap", 0),
        ("logit_softcap", float("nan")),
        ("vocabulary_size", 0),
        ("vocabulary_size", 65),
    ],
)
def test_impossible_heads_are_refused(field: str, value: float) -> None:
    message = codec.head_to_wire(HEAD)
    setattr(message, field, value)
    with pytest.raises(InvalidRequest):
        codec.head_from_wire(message)


@given(st.data())
def test_rdma_metadata_comes_whole_or_not_at_all(data: st.DataObject) -> None:
    memory = RemoteMemory(agent="kdmesh-1", metadata=data.draw(st.binary(min_size=1)), address=4096, size_bytes=64)
    wire = codec.memory_to_wire(memory)
    assert codec.memory_from_wire(wire) == memory
    place = data.draw(st.integers(0, len(memory.metadata) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(memory.metadata)
    damaged[place] ^= 1 << bit
    for wrong in (
        replace(memory, metadata=bytes(damaged)),
        replace(memory, metadata=memory.metadata[:-1]),
        replace(memory, address=4160),
        replace(memory, size_bytes=63),
        replace(memory, agent="kdmesh-2"),
    ):
        sent = codec.memory_to_wire(wrong)
        sent.digest = wire.digest
        with pytest.raises(Unavailable, match="wrong digest"):
            codec.memory_from_wire(sent)
