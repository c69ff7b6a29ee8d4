"""Whether SGLang computes what Hugging Face transformers does from the same weights, or else what it did before."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.images import after_first_token, noise_image
from kdmesh.losses.head import OutputHead
from kdmesh.models.body import hidden_states_TD
from kdmesh.models.checkpoint import Checkpoint
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader
from kdmesh.models.layer_outputs import captured, numbered_layers
from kdmesh.sglang.reference import transformers_model
from kdmesh.types import TokenSequence
from kdmesh_teacher.engine import Engine, EngineDescription, PrefillJob

log = logging.getLogger(__name__)

_LENGTHS = (2, 9, 40)
_SEED = 7
# Relative error |a - b| / |b| over all values. Rounding of 16 bits makes 1e-2, quantization 5e-2; hidden states of
# another layer, before the final norm or of other tokens are further than 0.5 away.
_MAX_ROW_ERROR = 0.1
_MAX_KL_NATS = 0.05


def check_reference(
    engine: Engine, model: EngineDescription, checkpoint: Checkpoint, reader: ImageReader | None = None
) -> int:
    """Compare a few fixed sequences with transformers, or with an earlier start. Blocks for that long.

    transformers runs where the weights fit in memory a second time and it knows the model. Elsewhere the first
    start keeps its rows in the user's cache directory, and later ones are compared with those.

    Args:
        reader: the model's; None where it reads text alone.

    Returns:
        How many layers have outputs that can be asked for: `model.num_layers`, or 0 where they were not compared
        with transformers, or are others, for which the log has the reason.

    Raises:
        EngineFailure: final rows or distributions are further apart than rounding.
    """
    sequences = _sequences(model, reader)
    actual_RD = _rows(engine, model, sequences)
    reference_RC = _transformers_rows(model, checkpoint, sequences, reader)
    if reference_RC is not None:
        expected_RD, source = reference_RC[:, : model.hidden_size], "transformers"
    else:
        file = _file_of(model, checkpoint)
        kept_RD = _kept_rows_RD(file, actual_RD)
        if kept_RD is None:
            return 0
        expected_RD, source = kept_RD, f"an earlier start, whose rows {file} keeps,"
    row_error = float((actual_RD.float() - expected_RD.float()).norm() / expected_RD.float().norm())
    kl_nats = _kl_nats(checkpoint.output_head(actual_RD.dtype), expected_RD, actual_RD)
    if not (row_error <= _MAX_ROW_ERROR and kl_nats <= _MAX_KL_NATS):  # NaN is refused too
        raise EngineFailure(
            f"SGLang and {source} disagree about {model.name}: rows differ by {row_error:.2g} relative (at most "
            f"{_MAX_ROW_ERROR} is rounding), next-token distributions by {kl_nats:.2g} nats (at most {_MAX_KL_NATS})"
        )
    log.info("rows compared", extra={"with": source, "relative_error": row_error, "kl_nats": kl_nats})
    return 0 if reference_RC is None else _num_right_layers(engine, model, sequences, reference_RC)


def _num_right_layers(
    engine: Engine, model: EngineDescription, sequences: list[TokenSequence], reference_RC: Tensor
) -> int:
    """All, or 0 where one of them is another than in transformers."""
    if not model.num_layers:
        return 0
    try:
        actual_RC = _rows(engine, model, sequences, tuple(range(1, model.num_layers + 1)))
        error = _layer_error(actual_RC, reference_RC, model.num_layers)
    except EngineFailure as failure:
        log.warning("outputs of layers are not given", extra={"reason": str(failure)})
        return 0
    log.info("outputs of layers compared", extra={"layers": model.num_layers, "relative_error": error})
    return model.num_layers


def _layer_error(actual_RC: Tensor, reference_RC: Tensor, num_layers: int) -> float:
    """The largest relative error of a layer. Raises EngineFailure when it is further than rounding."""
    actual, expected = (each_RC.float().chunk(1 + num_layers, 1)[1:] for each_RC in (actual_RC, reference_RC))
    errors = []
    for index, actual_RD in enumerate(actual):
        errors.append(_relative_error(actual_RD, expected[index]))
        # Layers may be near to each other: it must be nearest to its own.
        next_ones = [near for near in (index - 1, index + 1) if 0 <= near < num_layers]
        nearest = min([_relative_error(actual_RD, expected[near]) for near in next_ones], default=math.inf)
        if not errors[-1] <= min(_MAX_ROW_ERROR, nearest):  # NaN is refused too
            raise EngineFailure(
                f"SGLang and transformers disagree about layer {index + 1}: rows differ by {errors[-1]:.2g} relative "
                f"(at most {_MAX_ROW_ERROR} is rounding), from rows of the layers beside it by {nearest:.2g}"
            )
    return max(errors)


def _relative_error(actual_RD: Tensor, expected_RD: Tensor) -> float:
    """Every row counts the same: those of some tokens are longer than all others by orders of magnitude."""
    lengths_R1 = expected_RD.norm(dim=1, keepdim=True)
    return float(((actual_RD - expected_RD) / lengths_R1).norm() / len(lengths_R1) ** 0.5)


def _transformers_rows(
    model: EngineDescription, checkpoint: Checkpoint, sequences: list[TokenSequence], reader: ImageReader | None
) -> Tensor | None:
    """[R, (1 + layers) * D] what transformers gives; None where it cannot run."""
    reference = transformers_model(checkpoint, getattr(torch, model.dtype))
    if reference is None:
        return None
    layers = numbered_layers(reference) if model.num_layers else {}
    with torch.inference_mode(), captured(layers) as outputs:
        packed = Packer(reference, reader).pack(sequences)
        hidden_TD = hidden_states_TD(reference, packed)
        parts = [hidden_TD, *(outputs[layer].to(hidden_TD.dtype) for layer in layers)]
        return torch.cat([part_TD.index_select(0, packed.rows_R) for part_TD in parts], 1)


def _file_of(model: EngineDescription, checkpoint: Checkpoint) -> Path:
    """Where rows of these weights, computed as this server computes, are kept from start to start."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # An updatable model's own fingerprint is that of its architecture, which other weights have too.
    return cache / "kdmesh" / f"rows-{checkpoint.fingerprint(model.model_fingerprint)}.safetensors"


def _kept_rows_RD(file: Path, actual_RD: Tensor) -> Tensor | None:
    """The rows of an earlier start; None, and `actual_RD` is kept, at the first."""
    try:
        if file.is_file():
            return load_file(file)["rows_RD"]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"rows_RD": actual_RD}, file)
        log.warning("rows compared with nothing, but kept for the next start", extra={"file": str(file)})
    except (OSError, SafetensorError) as error:
        log.warning("rows compared with nothing", extra={"reason": f"{file}: {error}"})
    return None


def _sequences(model: EngineDescription, reader: ImageReader | None) -> list[TokenSequence]:
    random = np.random.default_rng(_SEED)
    texts = [
        TokenSequence(
            token_ids=random.integers(0, model.head.vocabulary_size, length).astype(np.int32),
            positions=np.arange(length - 1, dtype=np.int32),
        )
        for length in _LENGTHS
        if length <= model.max_sequence_tokens
    ]
    if reader is None:
        return texts
    # An image token without an image is nothing that a request may hold.
    for text in texts:
        text.token_ids[text.token_ids == reader.token_id] = 0
    return [*texts, after_first_token(noise_image(112, 56, seed=_SEED), texts[-1].token_ids, reader)]


def _rows(
    engine: Engine, model: EngineDescription, sequences: list[TokenSequence], layers: tuple[int, ...] = ()
) -> Tensor:
    """[R, (1 + layers) * D] as a request for these layers gets them."""
    shape = sum(sequence.num_rows for sequence in sequences), model.hidden_size * (1 + len(layers))
    rows_RC = torch.full(shape, torch.nan, dtype=getattr(torch, model.dtype))
    out = rows_RC.view(torch.uint8).reshape(-1).numpy().data
    engine.prefill([PrefillJob(sequences=tuple(sequences), out=out, layers=layers)])
    return rows_RC


def _kl_nats(head: OutputHead, expected_RD: Tensor, actual_RD: Tensor) -> float:
    """Largest KL(transformers || SGLang) of a row."""
    log_p_RV = head.logits(expected_RD).float().log_softmax(-1)
    log_q_RV = head.logits(actual_RD).float().log_softmax(-1)
    return float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1).max())
