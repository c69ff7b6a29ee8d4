"""Translates between the messages of Generate and Describe and our types; everything on the wire is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, unquote

import numpy as np

from kdmesh.errors import InvalidRequest
from kdmesh.rpc import codec
from kdmesh.rpc.wire_enum import WireEnum
from kdmesh.tokens import digest
from kdmesh.types import FinishReason, Int32Array, PlacedImage, RolloutDescription, Sample, Sampling, TokenSequence
from kdmesh.v1 import rollout_pb2 as pb

_JOB = "kdmesh-job"  # metadata, which is ASCII

_REASONS = WireEnum(
    "finish reason", {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
)


def job_to_metadata(job: str) -> tuple[tuple[str, str], ...]:
    """What names the job that asks on a Generate stream."""
    return ((_JOB, quote(job, safe=" ")),)


def job_from_metadata(metadata: Mapping[str, str | bytes]) -> str:
    """Empty where none is named."""
    job = metadata.get(_JOB, "")
    return unquote(job) if isinstance(job, str) else ""


def sampling_from_wire(m: pb.SamplingParameters) -> Sampling:
    """Raises InvalidRequest when a parameter is out of its range."""
    return Sampling(
        temperature=m.temperature,
        top_p=m.top_p,
        top_k=m.top_k,
        min_p=m.min_p,
        repetition_penalty=m.repetition_penalty,
        max_new_tokens=m.max_new_tokens,
        stop_token_ids=tuple(m.stop_token_ids),
        stop_strings=tuple(m.stop_strings),
    )


def sampling_to_wire(sampling: Sampling) -> pb.SamplingParameters:
    """The same as a message."""
    return pb.SamplingParameters(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
        stop_strings=sampling.stop_strings,
    )


def sample_from_wire(m: pb.Sample, prompt_ids: Int32Array, images: tuple[PlacedImage, ...] = ()) -> Sample:
    """The sample of a prompt. Raises InvalidRequest when it is none, or its digest is that of another sequence."""
    sample = Sample(
        token_ids=codec.int32_from_wire(m.token_ids, "token id"),
        logprobs=np.array(m.logprobs, np.float32),
        finish_reason=_REASONS.from_wire(m.finish_reason),
        min_weight_version=m.min_weight_version,
        max_weight_version=m.max_weight_version,
    )
    if m.digest != sample_digest(prompt_ids, sample, images):
        raise InvalidRequest("the digest of a sample is not that of its prompt and its tokens")
    return sample


def sample_to_wire(
    index: int, sample: Sample, prompt_ids: Int32Array, images: tuple[PlacedImage, ...] = ()
) -> pb.Sample:
    """The same as a message."""
    return pb.Sample(
        sample_index=index,
        token_ids=sample.token_ids.tolist(),
        logprobs=sample.logprobs.tolist(),
        finish_reason=_REASONS.to_wire(sample.finish_reason),
        min_weight_version=sample.min_weight_version,
        max_weight_version=sample.max_weight_version,
        digest=sample_digest(prompt_ids, sample, images),
    )


def sample_digest(prompt_ids: Int32Array, sample: Sample, images: tuple[PlacedImage, ...]) -> bytes:
    """16 bytes over prompt and response, with a position for every token of the response."""
    num_tokens = len(prompt_ids) + sample.num_tokens
    sequence = TokenSequence(
        token_ids=np.concatenate([prompt_ids, sample.token_ids]),
        positions=np.arange(len(prompt_ids) - 1, num_tokens - 1, dtype=np.int32),
        images=images,
    )
    return digest([sequence])


def rollout_description_from_wire(m: pb.DescribeRolloutResponse) -> RolloutDescription:
    """Raises InvalidRequest when the description is impossible."""
    if m.vocabulary_size == 0 or m.max_sequence_tokens < 2:
        raise InvalidRequest(f"a model of {m.vocabulary_size} tokens that takes sequences of {m.max_sequence_tokens}")
    return RolloutDescription(
        name=m.model_name,
        architecture_fingerprint=m.architecture_fingerprint,
        tokenizer_fingerprint=m.tokenizer_fingerprint,
        vocabulary_size=m.vocabulary_size,
        weight_version=m.weight_version,
        max_sequence_tokens=m.max_sequence_tokens,
        is_deterministic=m.is_deterministic,
        dtype=codec.DTYPES.from_wire(m.dtype),
        vision=codec.vision_from_wire(m.vision) if m.HasField("vision") else None,
    )


def rollout_description_to_wire(model: RolloutDescription) -> pb.DescribeRolloutResponse:
    """The same as a message."""
    return pb.DescribeRolloutResponse(
        model_name=model.name,
        architecture_fingerprint=model.architecture_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        vocabulary_size=model.vocabulary_size,
        weight_version=model.weight_version,
        max_sequence_tokens=model.max_sequence_tokens,
        is_deterministic=model.is_deterministic,
        dtype=codec.DTYPES.to_wire(model.dtype),
        vision=None if model.vision is None else codec.vision_to_wire(model.vision),
    )
