"""Whether the log-probabilities of SGLang's samples are those of Hugging Face transformers, or of its own prefill."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.images import after_first_token, noise_image
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader
from kdmesh.sglang.reference import transformers_model
from kdmesh.sglang.runtime import SglangRuntime
from kdmesh.types import Int32Array, PlacedImage, Sample, Sampling, TokenSequence
from kdmesh_rollout.engine import Engine, EngineDescription, Order

log = logging.getLogger(__name__)

_LENGTHS = (3, 24)  # of prompts
_NEW_TOKENS = 12
_SEED = 7
# Of the mean difference. Rounding of 16 bits makes 1e-2, quantization 5e-2; other tokens or another layer, above 0.5.
_MAX_NATS = 0.1


def check_reference(
    engine: Engine, model: EngineDescription, runtime: SglangRuntime, reader: ImageReader | None = None
) -> None:
    """Draw from a few fixed prompts, and compare. Blocks for that long; nothing else may be under way.

    transformers runs where the weights fit in memory a second time and it knows the model. Elsewhere SGLang itself is
    given the same tokens as prompts, of those without an image.

    Args:
        reader: the model's; None where it reads text alone.

    Raises:
        EngineFailure: they are further apart than rounding.
    """
    sequences, samples = _draw(engine, _prompts(model, reader))
    expected_R, source = _transformers_R(model, runtime, sequences, reader), "transformers"
    if expected_R is None:
        texts = [number for number, sequence in enumerate(sequences) if not sequence.images]
        samples = [samples[number] for number in texts]
        expected_R, source = _prefilled_R(runtime, [sequences[number] for number in texts]), "its own prefill"
    drawn_R = torch.cat([torch.from_numpy(sample.logprobs) for sample in samples])
    difference = float((drawn_R - expected_R).abs().mean())
    if not difference <= _MAX_NATS:  # NaN is refused too
        raise EngineFailure(
            f"SGLang and {source} disagree about {model.name}: the log-probabilities of samples differ by "
            f"{difference:.2g} nats on average (at most {_MAX_NATS} is rounding)"
        )
    log.info("log-probabilities compared", extra={"with": source, "mean_difference_nats": difference})


def _prompts(model: EngineDescription, reader: ImageReader | None) -> list[tuple[Int32Array, tuple[PlacedImage, ...]]]:
    random = np.random.default_rng(_SEED)
    texts = [random.integers(0, model.vocabulary_size, length).astype(np.int32) for length in _LENGTHS]
    if reader is None:
        return [(ids, ()) for ids in texts]
    # An image token without an image is nothing that a prompt may hold.
    texts = [np.where(ids == reader.token_id, 0, ids).astype(np.int32) for ids in texts]
    seeing = after_first_token(noise_image(112, 56, seed=_SEED), texts[-1], reader)
    return [*((ids, ()) for ids in texts), (seeing.token_ids, seeing.images)]


def _draw(
    engine: Engine, prompts: list[tuple[Int32Array, tuple[PlacedImage, ...]]]
) -> tuple[list[TokenSequence], list[Sample]]:
    keys = range(-len(prompts), 0)  # orders have keys from 0 on
    for key, (ids, images) in zip(keys, prompts, strict=True):
        sampling = Sampling(max_new_tokens=_NEW_TOKENS)
        engine.add(Order(key=key, prompt_ids=ids, sampling=sampling, seed=_SEED, images=images))
    samples = {}
    while engine.num_running:
        samples.update({finished.key: finished.sample for finished in engine.step()})
    drawn = [samples[key] for key in keys]
    return [_sequence(ids, images, sample) for (ids, images), sample in zip(prompts, drawn, strict=True)], drawn


def _sequence(prompt_ids: Int32Array, images: tuple[PlacedImage, ...], sample: Sample) -> TokenSequence:
    first, last = len(prompt_ids) - 1, len(prompt_ids) + sample.num_tokens - 2
    return TokenSequence(
        token_ids=np.concatenate([prompt_ids, sample.token_ids]),
        positions=np.arange(first, last + 1, dtype=np.int32),
        images=images,
    )


def _transformers_R(
    model: EngineDescription, runtime: SglangRuntime, sequences: list[TokenSequence], reader: ImageReader | None
) -> Tensor | None:
    dtype = getattr(torch, model.dtype)
    reference = transformers_model(runtime.checkpoint, dtype)
    if reference is None:
        return None
    with torch.inference_mode():
        packed = Packer(reference, reader).pack(sequences)
        rows_RD = hidden_states_TD(reference, packed).index_select(0, packed.rows_R)
        logits_RV = runtime.checkpoint.output_head(dtype).sliced(model.vocabulary_size).logits(rows_RD)
        labels_R = torch.from_numpy(np.concatenate([sequence.labels for sequence in sequences])).long()
        return logits_RV.log_softmax(-1).gather(1, labels_R[:, None])[:, 0]


def _prefilled_R(runtime: SglangRuntime, sequences: list[TokenSequence]) -> Tensor:
    """SGLang's own, of the tokens that its requests bring; the first token of each has none."""
    answers = runtime.run(
        runtime.engine.async_generate(
            input_ids=[sequence.token_ids.tolist() for sequence in sequences],
            sampling_params={"max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
    )
    logprobs = [[logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"]] for answer in answers]
    return torch.cat(
        [torch.tensor(own[1:])[sequence.positions] for sequence, own in zip(sequences, logprobs, strict=True)]
    )
