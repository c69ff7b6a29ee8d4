"""What a request must be before any work is done for it."""

from __future__ import annotations

from kdmesh.errors import InvalidRequest, ModelMismatch
from kdmesh.types import RolloutDescription, Sampling
from kdmesh_rollout.work import SampleRequest

_MAX_SAMPLES = 4096  # of one request
# After every token of a sample they are looked for, while the others' samples wait.
_MAX_STOP_TOKENS, _MAX_STOP_STRINGS, _MAX_STOP_BYTES = 1024, 256, 1024


def check_request(request: SampleRequest, model: RolloutDescription) -> None:
    """Raises InvalidRequest, with the value and the limit, when the model cannot answer the request."""
    if not 1 <= request.num_samples <= _MAX_SAMPLES:
        raise InvalidRequest(f"num_samples is {request.num_samples}; it must be from 1 to {_MAX_SAMPLES}")
    length = len(request.prompt_ids)
    if not length:
        raise InvalidRequest("the prompt is empty; it needs at least one token")
    if length >= model.max_sequence_tokens:
        raise InvalidRequest(
            f"the prompt has {length} tokens, which leaves no room for a response: prompt and response together have "
            f"at most {model.max_sequence_tokens}"
        )
    if request.images and model.vision is None:
        raise InvalidRequest(f"the prompt has {len(request.images)} images; this model reads none")
    _check_ids("the prompt", int(request.prompt_ids.max()), model)
    _check_stops(request.sampling, model)


def check_model(architecture_fingerprint: str, min_weight_version: int, model: RolloutDescription) -> None:
    """Raises ModelMismatch when the client wants another model than is served, or newer weights."""
    if architecture_fingerprint not in ("", model.architecture_fingerprint):
        raise ModelMismatch(
            f"the request is for architecture {architecture_fingerprint}; "
            f"this server has {model.architecture_fingerprint}"
        )
    if min_weight_version > model.weight_version:
        raise ModelMismatch(
            f"the request wants weights of version {min_weight_version} or newer; "
            f"this server has {model.weight_version}"
        )


def _check_stops(sampling: Sampling, model: RolloutDescription) -> None:
    _check_count("stop_token_ids", len(sampling.stop_token_ids), _MAX_STOP_TOKENS)
    _check_count("stop_strings", len(sampling.stop_strings), _MAX_STOP_STRINGS)
    _check_count("the bytes of a stop string", max(map(_bytes, sampling.stop_strings), default=0), _MAX_STOP_BYTES)
    if sampling.stop_token_ids:
        _check_ids("stop_token_ids", max(sampling.stop_token_ids), model)
    if sampling.stop_strings and not model.tokenizer_fingerprint:
        raise InvalidRequest("stop_strings need a tokenizer, and this model has none; give stop_token_ids")


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequest(f"{what} are {count}; at most {most} are allowed")


def _bytes(text: str) -> int:
    return len(text.encode())


def _check_ids(what: str, largest: int, model: RolloutDescription) -> None:
    if largest >= model.vocabulary_size:
        raise InvalidRequest(f"{what} has token id {largest}; ids must be below {model.vocabulary_size}")
