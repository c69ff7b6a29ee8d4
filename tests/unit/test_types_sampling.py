"""What a sampling request and a sample must be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kdmesh.errors import InvalidRequest
from kdmesh.types import FinishReason, Sample, Sampling


def sample(**changes: Any) -> Sample:
    fields = {
        "token_ids": np.array([3, 4], np.int32),
        "logprobs": np.array([-0.5, 0.0], np.float32),
        "finish_reason": FinishReason.STOP,
        "min_weight_version": 1,
        "max_weight_version": 2,
    }
    return Sample(**(fields | changes))


def test_sampling_draws_from_the_whole_distribution_unless_told_otherwise() -> None:
    plain = Sampling(max_new_tokens=1)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p, plain.repetition_penalty) == (1, 1, 0, 0, 1)
    assert plain.stop_token_ids == () and plain.stop_strings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or more"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": -0.5}, "min_p is -0.5; it must be from 0 to 1"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"stop_token_ids": (5, -2)}, "stop_token_ids holds -2"),
        ({"stop_strings": ("end", "")}, "stop_strings holds an empty text"),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_its_value_and_the_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Sampling(**({"max_new_tokens": 4} | changes))


def test_a_sample_knows_its_length() -> None:
    assert sample().num_tokens == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32)}, "at least 1 token"),
        ({"token_ids": np.array([3, -4], np.int32)}, "token id -4 is negative"),
        ({"logprobs": np.zeros(3, np.float32)}, r"a sample of 2 tokens has log-probabilities of shape \(3,\)"),
        ({"logprobs": np.array([-1.0, 0.25], np.float32)}, "a log-probability is 0.25"),
        ({"logprobs": np.array([-1.0, np.nan], np.float32)}, "a log-probability is nan"),
        ({"min_weight_version": 3}, "weight versions 3 to 2"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sample(**changes)
