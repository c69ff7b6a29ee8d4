"""What a request must be before any work is done for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kdmesh.errors import InvalidRequest, ModelMismatch
from kdmesh.types import ModelDescription, TokenSequence


def check_number(num_sequences: int, model: ModelDescription) -> None:
    """For sequences that are not decoded yet: so many of them would take long, and hold up everybody's calls.

    Raises:
        InvalidRequest: they have more tokens than the model takes, since each has at least 2; or there is none.
    """
    if not num_sequences:
        raise InvalidRequest("the request holds no sequence; it needs at least one")
    if 2 * num_sequences > model.max_request_tokens:
        raise InvalidRequest(
            f"the request has {num_sequences} sequences of at least 2 tokens each; the most tokens allowed are "
            f"{model.max_request_tokens}"
        )


def check_layers(layers: Sequence[int], model: ModelDescription) -> None:
    """Raises InvalidRequest when the model has no such layers, or they are out of order."""
    if not layers:
        return
    if not model.num_layers:
        raise InvalidRequest(f"the request is for layers; teacher {model.name} gives final hidden states alone")
    if len(layers) > model.num_layers:
        raise InvalidRequest(f"the request is for {len(layers)} layers; the model has {model.num_layers}")
    if any(one >= next_one for one, next_one in itertools.pairwise(layers)):
        raise InvalidRequest(f"the request is for layers {list(layers)}, which must be ascending")
    for layer in (layers[0], layers[-1]):
        if not 1 <= layer <= model.num_layers:
            raise InvalidRequest(f"the request is for layer {layer}; the model has layers 1 to {model.num_layers}")


def check_sequences(sequences: Sequence[TokenSequence], model: ModelDescription, layers: Sequence[int]) -> None:
    """Raises InvalidRequest, with the value and the limit, when the model cannot answer the request."""
    limit = model.head.padded_vocabulary_size
    for index, sequence in enumerate(sequences):
        if sequence.num_tokens > model.max_sequence_tokens:
            raise InvalidRequest(
                f"sequence {index} has {sequence.num_tokens} tokens; the longest allowed is {model.max_sequence_tokens}"
            )
        largest = int(sequence.token_ids.max())
        if largest >= limit:
            raise InvalidRequest(f"sequence {index} has token id {largest}; ids must be below {limit}")
        if sequence.images and model.vision is None:
            raise InvalidRequest(f"sequence {index} has {len(sequence.images)} images; this model reads none")
    _check_total("tokens", sum(s.num_tokens for s in sequences), model.max_request_tokens)
    _check_total("rows", sum(s.num_rows for s in sequences), model.for_layers(layers).max_request_rows)


def check_model(wanted: str, served: str) -> None:
    """Raises ModelMismatch when a fingerprint is not the loaded model's."""
    if wanted != served:
        raise ModelMismatch(f"the request is for model {wanted or '(none named)'}; this server has {served}")


def check_version(wanted: int, served: int) -> None:
    """Raises ModelMismatch when a request names other weights than those that are served; 0 names none."""
    if wanted not in (0, served):
        raise ModelMismatch(
            f"the request is for weight version {wanted}; this server has {served}: its weights were replaced, or it "
            "was started anew"
        )


def _check_total(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"the request has {count} {what} over all its sequences; the most allowed is {limit}")
