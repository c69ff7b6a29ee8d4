"""Whether a loaded engine computes: asked before it serves, and after it has failed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kdmesh.errors import EngineFailure
from kdmesh.images import after_first_token, noise_image
from kdmesh.serving.images import Vision
from kdmesh.types import DType, TokenSequence
from kdmesh_teacher.engine import Engine, EngineDescription, HeadParts, PrefillJob

_Float32Array = npt.NDArray[np.float32]

_IMAGE_SIDE = 112
_LEAST_CHANGE = 1e-3  # a blind model changes nothing, to the last bit where it is deterministic
_LENGTHS = (2, 7, 33)
# Batching changes the order of sums. Relative to the largest value of a row.
_TOLERANCE = {DType.FLOAT32: 1e-4, DType.FLOAT16: 2e-2, DType.BFLOAT16: 1e-1}


def check(engine: Engine, model: EngineDescription) -> None:
    """What follows, as far as it is the model's. Blocks for that long. Raises EngineFailure."""
    check_rows(engine, model)
    if model.vision is not None:
        check_images(engine, model, model.vision)


def check_images(engine: Engine, model: EngineDescription, vision: Vision) -> None:
    """Compute one text after an image, after the same image again, and after another one of the same size.

    Raises:
        EngineFailure: a row is not finite, the image changes nothing, or changes as much when it is the same.
    """
    images = [noise_image(_IMAGE_SIDE, _IMAGE_SIDE, seed=seed) for seed in (1, 1, 2)]
    text = (np.arange(1, 7, dtype=np.int64) * 7919 % model.head.vocabulary_size).astype(np.int32)
    asked = [after_first_token(image, text, vision) for image in images]
    first_RD, again_RD, other_RD = (_rows(engine, model, [sequence], ())[0] for sequence in asked)
    if not (np.isfinite(first_RD).all() and np.isfinite(other_RD).all()):
        raise EngineFailure("the model gives values that are not finite after an image")
    largest = max(float(np.abs(first_RD).max()), 1e-30)
    same, change = (float(np.abs(rows_RD - first_RD).max()) / largest for rows_RD in (again_RD, other_RD))
    if not (change > _LEAST_CHANGE and same < change / 2):
        raise EngineFailure(
            f"another image changes the rows after it by {change:.1e} of the largest value, and the same one by "
            f"{same:.1e}: the model does not see its images"
        )


def check_rows(engine: Engine, model: EngineDescription) -> None:
    """Compute a few fixed sequences, each alone and all together. Blocks for that long.

    Raises:
        EngineFailure: a row is not finite, or depends on what else was computed.
    """
    sequences = _sequences(model)
    layers = tuple(sorted({1, model.num_layers})) if model.num_layers else ()
    alone = [_rows(engine, model, [sequence], layers)[0] for sequence in sequences]
    together = _rows(engine, model, sequences, layers)
    for sequence, one_RC, other_RC in zip(sequences, alone, together, strict=True):
        # One by one: what layers give may be much larger than final hidden states.
        for one_RD, other_RD in zip(*(np.split(each, 1 + len(layers), 1) for each in (one_RC, other_RC)), strict=True):
            _check_same(sequence, one_RD, other_RD, model)


def _check_same(
    sequence: TokenSequence, one_RD: _Float32Array, other_RD: _Float32Array, model: EngineDescription
) -> None:
    tolerance = 0.0 if model.is_deterministic else _TOLERANCE[model.dtype]
    if not np.isfinite(one_RD).all():
        raise EngineFailure(f"the model gives values that are not finite for token ids {sequence.token_ids}")
    difference = float(np.abs(one_RD - other_RD).max() / max(float(np.abs(one_RD).max()), 1e-30))
    if not difference <= tolerance:
        raise EngineFailure(
            f"a sequence of {sequence.num_tokens} tokens gets other rows in a batch than alone: "
            f"they differ by {difference:.1e} of the largest value, and at most {tolerance:.1e} is allowed"
        )


def check_head(parts: HeadParts, model: EngineDescription) -> None:
    """Raises EngineFailure when the head's matrices do not have the sizes its description says."""
    rows, itemsize = model.head.padded_vocabulary_size, parts.dtype.size_bytes
    if parts.weight.nbytes != rows * model.hidden_size * itemsize:
        raise EngineFailure(f"the head's weight has {parts.weight.nbytes} bytes, not {rows} x {model.hidden_size}")
    if (parts.bias is not None) is not model.head.has_bias:
        raise EngineFailure("the head's bias and its description disagree")
    if parts.bias is not None and parts.bias.nbytes != rows * itemsize:
        raise EngineFailure(f"the head's bias has {parts.bias.nbytes} bytes for {rows} tokens")


def _sequences(model: EngineDescription) -> list[TokenSequence]:
    longest = min(model.max_sequence_tokens, model.max_batch_tokens // len(_LENGTHS))
    lengths = [min(length, longest) for length in _LENGTHS]
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int64) * 7919 % model.head.vocabulary_size
    return [
        TokenSequence(token_ids=part.astype(np.int32), positions=np.arange(len(part) - 1, dtype=np.int32))
        for part in np.split(ids, np.cumsum(lengths)[:-1])
    ]


def _rows(
    engine: Engine, model: EngineDescription, sequences: Sequence[TokenSequence], layers: tuple[int, ...]
) -> list[_Float32Array]:
    """[R, (1 + layers) * D] float32 for each sequence, computed in one call as one job each."""
    row_bytes = model.row_bytes(layers)
    # What the engine does not write stays not a number, which the check refuses.
    outs = [bytearray(b"\xff" * (sequence.num_rows * row_bytes)) for sequence in sequences]
    jobs = [
        PrefillJob(sequences=(s,), out=memoryview(out), layers=layers) for s, out in zip(sequences, outs, strict=True)
    ]
    engine.prefill(jobs)
    return [
        _float32(out, model.dtype).reshape(sequence.num_rows, -1) for sequence, out in zip(sequences, outs, strict=True)
    ]


def _float32(data: bytearray, dtype: DType) -> _Float32Array:
    match dtype:
        case DType.FLOAT32:
            return np.frombuffer(data, dtype="<f4")
        case DType.FLOAT16:
            return np.frombuffer(data, dtype="<f2").astype(np.float32)
        case DType.BFLOAT16:  # numpy lacks it: the upper half of a float32
            return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
