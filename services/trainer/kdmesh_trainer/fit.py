"""Refuses services that do not fit the student, or data that does not fit the services."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kdmesh.errors import DataError, InvalidRequest, ModelMismatch
from kdmesh.images import check_image_size
from kdmesh.types import ModelDescription, PlacedImage, RolloutDescription, TokenSequence, VisionSpec
from kdmesh_trainer.data.encoding.sides import aligned_rows
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens

log = logging.getLogger(__name__)


def common_vocabulary(teacher: ModelDescription, *, tokenizer_fingerprint: str, vocabulary_size: int) -> int:
    """The number of real tokens that student and teacher share, whatever their heads are padded to.

    Args:
        tokenizer_fingerprint: of the student's tokenizer.
        vocabulary_size: real tokens of the student's tokenizer.

    Raises:
        ModelMismatch: the tokenizers differ, or the teacher has none to compare.
    """
    if not teacher.tokenizer_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has no tokenizer in its model directory, so nothing proves that its token ids "
            f"mean what the student's do (fingerprint {tokenizer_fingerprint})"
        )
    if teacher.tokenizer_fingerprint != tokenizer_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has another tokenizer (fingerprint {teacher.tokenizer_fingerprint}) than the "
            f"student (fingerprint {tokenizer_fingerprint}); distributions over different vocabularies cannot be "
            "compared token by token"
        )
    return min(teacher.head.vocabulary_size, vocabulary_size)


def check_aligned(sequences: Sequence[TokenSequence], tokens: TeacherTokens, *, at_least: float) -> None:
    """Log how many loss tokens are compared with the teacher's. Raises DataError when they are too few."""
    refuse_unlike(sum(map(aligned_rows, sequences)) / sum(s.num_rows for s in sequences), tokens, at_least=at_least)


def refuse_unlike(aligned: float, tokens: TeacherTokens, *, at_least: float) -> None:
    """Log which part of the tokens is compared with the teacher's. Raises DataError when it is too small."""
    assert tokens.shared is not None
    facts = {"aligned_fraction": round(aligned, 4), "shared_tokens": len(tokens.shared.student_ids)}
    log.info("tokenizers aligned", extra=facts)
    if aligned < at_least:
        raise DataError(
            f"{aligned:.1%} of the tokens have a counterpart among the teacher's, and "
            f"data.teacher_tokenizer.min_aligned is {at_least:g}: these tokenizers have too little in common"
        )


def check_frozen(teacher: ModelDescription) -> None:
    """Raises ModelMismatch when another job may replace the teacher's weights while this one learns from it."""
    if teacher.architecture_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has engine.updatable, so that another job may replace its weights; this job wants "
            "a frozen one, or teacher.follows_student"
        )


def check_follower(teacher: ModelDescription, *, architecture_fingerprint: str) -> None:
    """Return when the teacher takes the student's weights.

    Args:
        architecture_fingerprint: the student's.

    Raises:
        ModelMismatch: it is frozen, or another model.
    """
    if not teacher.architecture_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} is frozen; teacher.follows_student needs one that is configured with "
            "engine.updatable"
        )
    if teacher.architecture_fingerprint != architecture_fingerprint:
        raise ModelMismatch(
            f"teacher {teacher.name} has another architecture (fingerprint {teacher.architecture_fingerprint}) than "
            f"the student (fingerprint {architecture_fingerprint}), so it cannot have its weights; start it with the "
            "model directory that the student starts from"
        )


def check_requests(
    name: str, sequences: Sequence[TokenSequence], teacher: ModelDescription, *, image_expansion: str = ""
) -> None:
    """Return when the teacher takes every sequence of dataset `name` by itself; groups are split to its limits.

    Args:
        image_expansion: as TeacherTokens has it.

    Raises:
        DataError: one is too long, has too many loss tokens, or an image that the teacher does not take.
        ModelMismatch: the teacher's image processor makes other numbers of tokens.
    """
    check_images(name, [placed for s in sequences for placed in s.images], teacher, image_expansion=image_expansion)
    check_lengths(
        name,
        tokens=max(sequence.num_tokens for sequence in sequences),
        rows=max(sequence.num_rows for sequence in sequences),
        teacher=teacher,
    )


def check_lengths(name: str, *, tokens: int, rows: int, teacher: ModelDescription) -> None:
    """Return when the teacher takes the longest sequences of dataset `name`. Raises DataError when it does not."""
    _check_limits(f"dataset {name} has a sequence", tokens=tokens, rows=rows, teacher=teacher)


def check_images(name: str, images: Sequence[PlacedImage], teacher: ModelDescription, *, image_expansion: str) -> None:
    """Return when the teacher takes every image of dataset `name`. Raises as `check_requests`."""
    _check_images(name, images, f"teacher {teacher.name}", teacher.vision, image_expansion)


def _check_images(
    name: str, images: Sequence[PlacedImage], who: str, vision: VisionSpec | None, image_expansion: str
) -> None:
    if not images:
        return
    if vision is None:
        raise DataError(
            f"dataset {name} has {len(images)} images, and {who} reads none: it needs a model that "
            "does, with its preprocessor_config.json beside it"
        )
    if vision.expansion != image_expansion:
        raise ModelMismatch(
            f"the image processors of {who} and of the student make different numbers of tokens of "
            "an image: what decides that in their preprocessor_config.json, as size, must be the same"
        )
    for placed in images:
        assert placed.image is not None
        try:
            check_image_size(placed.image, max_bytes=vision.max_image_bytes, max_pixels=vision.max_image_pixels)
        except InvalidRequest as error:
            raise DataError(f"dataset {name}: {error} by {who}: raise its `images` limits") from None


def check_samples(*, tokens: int, rows: int, teacher: ModelDescription) -> None:
    """Return when the teacher takes every prompt with its response, however long it gets.

    Args:
        tokens: of the longest.
        rows: of the one with most loss tokens.

    Raises:
        DataError: it could be too long, or have too many loss tokens.
    """
    _check_limits("there may be a prompt with a response", tokens=tokens, rows=rows, teacher=teacher)


def check_sampler(
    server: RolloutDescription,
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int,
    max_tokens: int,
    keys: str = "source.sampling.max_new_tokens or data.max_tokens",
) -> None:
    """Return when the rollout servers sample what the student can be trained on.

    Args:
        tokenizer_fingerprint: of the student's tokenizer.
        vocabulary_size: real tokens that student and teacher share.
        max_tokens: of the longest prompt with the longest response.
        keys: of the configuration, that make it shorter.

    Raises:
        ModelMismatch: they have another tokenizer, or may draw tokens that the teacher lacks.
        DataError: they would cut responses that the configuration allows.
    """
    if server.tokenizer_fingerprint != tokenizer_fingerprint:
        raise ModelMismatch(
            f"rollout server {server.name} has "
            f"{'another' if server.tokenizer_fingerprint else 'no'} tokenizer (fingerprint "
            f"{server.tokenizer_fingerprint or 'none'}); the student's has {tokenizer_fingerprint}, and their ids "
            "must mean the same"
        )
    if server.vocabulary_size > vocabulary_size:
        raise ModelMismatch(
            f"rollout server {server.name} draws from {server.vocabulary_size} tokens, and the teacher shares only "
            f"{vocabulary_size} with the student"
        )
    if server.max_sequence_tokens < max_tokens:
        raise DataError(
            f"a prompt with its response may be {max_tokens} tokens, and rollout server {server.name} takes at most "
            f"{server.max_sequence_tokens}; lower {keys}"
        )


def check_sampler_images(
    name: str, images: Sequence[PlacedImage], server: RolloutDescription, *, image_expansion: str
) -> None:
    """Return when the rollout servers read the images of dataset `name` as the student does. Raises as
    `check_requests`.
    """
    _check_images(name, images, f"rollout server {server.name}", server.vision, image_expansion)


def _check_limits(what: str, *, tokens: int, rows: int, teacher: ModelDescription) -> None:
    most_tokens = min(teacher.max_sequence_tokens, teacher.max_request_tokens)
    if tokens > most_tokens:
        is_of_model = teacher.max_sequence_tokens < teacher.max_request_tokens
        other = "" if is_of_model else ", or raise the teacher's engine.max_batch_tokens"
        raise DataError(
            f"{what} of {tokens} tokens, and teacher {teacher.name} takes at most {most_tokens}"
            f"{', as its model does' if is_of_model else ''}; lower data.max_tokens{other}"
        )
    if rows > teacher.max_request_rows:
        raise DataError(
            f"{what} of {rows} loss tokens, and one answer of teacher {teacher.name} holds "
            f"{teacher.max_request_rows}; lower data.max_tokens, or raise the teacher's slab.slot_mib"
        )
