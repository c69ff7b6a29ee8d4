"""Requests for samples, and samples, survive the wire."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdmesh.errors import InvalidRequest
from kdmesh.rpc.rollouts import codec as rollout_codec
from kdmesh.rpc.rollouts.fleet import _runs
from kdmesh.tokens import digest
from kdmesh.types import DType, FinishReason, RolloutDescription, Sample, Sampling, TokenSequence
from kdmesh.v1 import rollout_pb2 as pb

MODEL = RolloutDescription(
    name="m",
    architecture_fingerprint="aa",
    tokenizer_fingerprint="bb",
    vocabulary_size=60,
    weight_version=7,
    max_sequence_tokens=100,
    is_deterministic=True,
    dtype=DType.BFLOAT16,
)
PROMPT = np.array([5, 2, 9], np.int32)


@given(
    st.builds(
        Sampling,
        temperature=st.floats(0, 10, width=32),
        top_p=st.floats(2**-10, 1, width=32),
        top_k=st.integers(0, 2**32 - 1),
        min_p=st.floats(0, 1, width=32),
        repetition_penalty=st.floats(2**-5, 8, width=32),
        max_new_tokens=st.integers(1, 2**32 - 1),
        stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
        stop_strings=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3).map(tuple),
    )
)
def test_sampling_survives(sampling: Sampling) -> None:
    wire = pb.SamplingParameters.FromString(rollout_codec.sampling_to_wire(sampling).SerializeToString())
    assert rollout_codec.sampling_from_wire(wire) == sampling


def test_a_sample_survives_with_the_digest_that_a_teacher_will_answer_with() -> None:
    sample = Sample(
        token_ids=np.array([4, 0], np.int32),
        logprobs=np.array([-0.1, -7.25], np.float32),
        finish_reason=FinishReason.STOP,
        min_weight_version=2,
        max_weight_version=2**40,
    )
    wire = pb.Sample.FromString(rollout_codec.sample_to_wire(3, sample, PROMPT).SerializeToString())
    asked = TokenSequence(token_ids=np.array([5, 2, 9, 4, 0], np.int32), positions=np.array([2, 3], np.int32))
    assert (wire.sample_index, wire.digest) == (3, digest([asked]))
    read = rollout_codec.sample_from_wire(wire, PROMPT)
    np.testing.assert_array_equal(read.token_ids, sample.token_ids)
    np.testing.assert_array_equal(read.logprobs, sample.logprobs)
    assert (read.finish_reason, read.min_weight_version, read.max_weight_version) == (FinishReason.STOP, 2, 2**40)
    with pytest.raises(InvalidRequest, match="digest"):
        rollout_codec.sample_from_wire(wire, PROMPT[::-1])


def test_a_description_survives_and_an_impossible_one_does_not() -> None:
    wire = rollout_codec.rollout_description_to_wire(MODEL)
    assert rollout_codec.rollout_description_from_wire(wire) == MODEL
    for wrong in (replace(MODEL, vocabulary_size=0), replace(MODEL, max_sequence_tokens=1)):
        with pytest.raises(InvalidRequest, match="a model of"):
            rollout_codec.rollout_description_from_wire(rollout_codec.rollout_description_to_wire(wrong))


@given(st.sets(st.integers(0, 40)))
def test_missing_samples_are_asked_for_in_runs_of_neighbours(missing: set[int]) -> None:
    runs = list(_runs(sorted(missing)))
    asked = [begin + offset for begin, count in runs for offset in range(count)]
    assert asked == sorted(missing)
    assert all(later > begin + count for (begin, count), (later, _) in pairwise(runs))
