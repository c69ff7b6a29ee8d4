"""Which teachers and data are refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdmesh.errors import DataError, ModelMismatch
from kdmesh.types import DType, HeadSpec, ModelDescription, RolloutDescription, TokenSequence
from kdmesh_trainer.fit import (
    check_follower,
    check_frozen,
    check_requests,
    check_sampler,
    check_samples,
    common_vocabulary,
)

TEACHER = ModelDescription(
    name="big",
    model_fingerprint="m",
    tokenizer_fingerprint="aaaa",
    hidden_size=8,
    dtype=DType.FLOAT32,
    head=HeadSpec(logit_scale=1.0, logit_softcap=None, vocabulary_size=100, padded_vocabulary_size=128, has_bias=False),
    weight_version=1,
    max_sequence_tokens=50,
    max_request_tokens=40,
    max_request_rows=10,
    is_deterministic=True,
)


def sequence(tokens: int, rows: int) -> TokenSequence:
    return TokenSequence(token_ids=np.arange(tokens, dtype=np.int32), positions=np.arange(rows, dtype=np.int32))


def test_the_common_vocabulary_is_the_real_one_whatever_the_padding() -> None:
    assert common_vocabulary(TEACHER, tokenizer_fingerprint="aaaa", vocabulary_size=100) == 100
    assert common_vocabulary(TEACHER, tokenizer_fingerprint="aaaa", vocabulary_size=98) == 98


def test_another_tokenizer_is_refused_with_both_names() -> None:
    with pytest.raises(ModelMismatch, match=r"teacher big has another tokenizer \(fingerprint aaaa\).*bbbb"):
        common_vocabulary(TEACHER, tokenizer_fingerprint="bbbb", vocabulary_size=100)


def test_a_teacher_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ModelMismatch, match="teacher big has no tokenizer"):
        common_vocabulary(replace(TEACHER, tokenizer_fingerprint=""), tokenizer_fingerprint="b", vocabulary_size=100)


def test_a_teacher_that_another_job_may_change_is_refused() -> None:
    check_frozen(TEACHER)
    with pytest.raises(ModelMismatch, match=r"teacher big has engine\.updatable"):
        check_frozen(replace(TEACHER, architecture_fingerprint="f"))


def test_a_teacher_follows_a_student_of_its_own_architecture_only_and_unless_it_is_frozen() -> None:
    check_follower(replace(TEACHER, architecture_fingerprint="f"), architecture_fingerprint="f")
    with pytest.raises(ModelMismatch, match=r"teacher big has another architecture \(fingerprint f\).*student.*g"):
        check_follower(replace(TEACHER, architecture_fingerprint="f"), architecture_fingerprint="g")
    with pytest.raises(ModelMismatch, match="teacher big is frozen"):
        check_follower(TEACHER, architecture_fingerprint="g")


def test_every_sequence_must_fit_a_request_by_itself() -> None:
    check_requests("train", [sequence(40, 10), sequence(30, 3)], TEACHER)
    with pytest.raises(DataError, match="dataset train has a sequence of 41 tokens, and teacher big takes at most 40"):
        check_requests("train", [sequence(41, 1)], TEACHER)
    of_model = replace(TEACHER, max_sequence_tokens=30)
    with pytest.raises(DataError, match=r"takes at most 30, as its model does; lower data\.max_tokens$"):
        check_requests("train", [sequence(31, 1)], of_model)
    with pytest.raises(DataError, match=r"takes at most 40; .*, or raise the teacher's engine\.max_batch_tokens$"):
        check_requests("train", [sequence(41, 1)], replace(TEACHER, max_sequence_tokens=40))
    with pytest.raises(DataError, match=r"held_out has a sequence of 11 loss tokens.*holds 10.*slab\.slot_mib"):
        check_requests("held_out", [sequence(30, 11)], TEACHER)


def test_the_longest_response_to_the_longest_prompt_must_fit_a_request() -> None:
    check_samples(tokens=30 + 10, rows=10, teacher=TEACHER)
    with pytest.raises(DataError, match="a prompt with a response of 41 tokens, and teacher big takes at most 40"):
        check_samples(tokens=31 + 10, rows=10, teacher=TEACHER)
    with pytest.raises(DataError, match="a response of 11 loss tokens, and one answer of teacher big holds 10"):
        check_samples(tokens=3 + 11, rows=11, teacher=TEACHER)


SERVER = RolloutDescription(
    name="learner",
    architecture_fingerprint="x",
    tokenizer_fingerprint="aaaa",
    vocabulary_size=100,
    weight_version=0,
    max_sequence_tokens=50,
    is_deterministic=True,
    dtype=DType.FLOAT32,
)


def test_a_rollout_server_must_draw_what_the_teacher_can_score() -> None:
    check_sampler(SERVER, tokenizer_fingerprint="aaaa", vocabulary_size=100, max_tokens=50)
    with pytest.raises(ModelMismatch, match=r"learner has another tokenizer \(fingerprint aaaa\).* bbbb"):
        check_sampler(SERVER, tokenizer_fingerprint="bbbb", vocabulary_size=100, max_tokens=50)
    bare = replace(SERVER, tokenizer_fingerprint="")
    with pytest.raises(ModelMismatch, match=r"learner has no tokenizer \(fingerprint none\)"):
        check_sampler(bare, tokenizer_fingerprint="aaaa", vocabulary_size=100, max_tokens=50)
    with pytest.raises(ModelMismatch, match="draws from 100 tokens, and the teacher shares only 99"):
        check_sampler(SERVER, tokenizer_fingerprint="aaaa", vocabulary_size=99, max_tokens=50)
    with pytest.raises(DataError, match="may be 51 tokens, and rollout server learner takes at most 50"):
        check_sampler(SERVER, tokenizer_fingerprint="aaaa", vocabulary_size=100, max_tokens=51)
