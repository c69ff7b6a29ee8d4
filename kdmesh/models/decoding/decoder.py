"""A causal LM run token by token, over keys, values and states that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.decoding.cached_attention import CACHED_ATTENTION, NextTokens, Prompts
from kdmesh.models.decoding.kv_cache import KvCache
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader
from kdmesh.models.images.vision import attention_of
from kdmesh.models.packing import pack
from kdmesh.models.recurrent import decoding_refusal
from kdmesh.models.routing import steady_routing
from kdmesh.types import Int32Array, PlacedImage, TokenSequence

# Relative, over all values. Rounding makes 1e-6 and 1e-2; a wrong token, 0.8.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.1


class Decoder:
    """Final hidden states of sequences that grow, in rows 0 to len - 1 of one cache.

    `model` comes from load_causal_lm, and belongs to decoding from `prepare_decoding` on. Not for gradients.
    """

    def __init__(self, model: PreTrainedModel, *, tokens: int, reader: ImageReader | None = None) -> None:
        """An empty one, with room for a row of so many tokens, which grows.

        Args:
            reader: the model's; None where prompts have no images.
        """
        self._model = model
        self._packer = Packer(model, reader)
        self._cache = KvCache(rows=1, tokens=tokens)
        self._lengths: list[int] = []
        self._shifts: list[int] = []  # of each row's next position from its length: images take fewer than they have

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, prompts: Sequence[Int32Array], images: Sequence[tuple[PlacedImage, ...]] | None = None) -> Tensor:
        """Add a row for each prompt, behind the others; [len(prompts), D] hidden states of their last tokens.

        Args:
            images: of each prompt; None: there are none.
        """
        first, lengths = len(self), tuple(len(prompt) for prompt in prompts)
        rows = tuple(range(first, first + len(prompts)))
        self._cache.reserve(rows=first + len(prompts), tokens=max(lengths) + 1)
        step = Prompts(cache=self._cache, rows=rows, lengths=lengths)
        if images is not None and any(images):
            hidden_TD = self._see(prompts, images, step)
        else:
            positions = np.concatenate([np.arange(length) for length in lengths])
            hidden_TD = self._forward(np.concatenate(prompts), positions, step)
            self._shifts += [0] * len(prompts)
        self._lengths += lengths
        ends_R = torch.tensor(np.cumsum(lengths) - 1, device=hidden_TD.device)
        return hidden_TD.index_select(0, ends_R)

    def fork(self, row: int) -> None:
        """Add a row that has all tokens of `row`; nothing is computed."""
        self._cache.reserve(rows=len(self) + 1, tokens=self._lengths[row])
        self._cache.copy_row(row, len(self), self._lengths[row])
        self._lengths.append(self._lengths[row])
        self._shifts.append(self._shifts[row])

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        last = len(self) - 1
        if row != last:
            self._cache.copy_row(last, row, self._lengths[last])
            self._lengths[row] = self._lengths[last]
            self._shifts[row] = self._shifts[last]
        self._lengths.pop()
        self._shifts.pop()

    def advance(self, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each row; [len, D] their hidden states."""
        longest = max(self._lengths)
        self._cache.reserve(rows=len(self), tokens=longest + 1)
        lengths = np.array(self._lengths, np.int64)
        step = NextTokens(
            cache=self._cache,
            lengths_B=torch.from_numpy(lengths).to(self._model.device),
            longest=longest,
            is_even=len(set(self._lengths)) == 1,
        )
        hidden_BD = self._forward(np.array(token_ids, np.int64), lengths + np.array(self._shifts, np.int64), step)
        self._lengths = [length + 1 for length in self._lengths]
        return hidden_BD

    def _see(self, prompts: Sequence[Int32Array], images: Sequence[tuple[PlacedImage, ...]], step: Prompts) -> Tensor:
        sequences = [_as_sequence(ids, placed) for ids, placed in zip(prompts, images, strict=True)]
        packed = self._packer.pack(sequences)
        assert packed.images is not None
        if (positions_3T := packed.images.position_ids_3T) is None:
            self._shifts += [0] * len(prompts)
        else:
            ends = [int(part.max()) for part in torch.split(positions_3T, list(step.lengths), dim=1)]
            self._shifts += [end + 1 - length for end, length in zip(ends, step.lengths, strict=True)]
        return hidden_states_TD(self._model, packed.to(self._model.device), decoding=step)

    def _forward(self, token_ids: np.ndarray, position_ids: np.ndarray, step: Prompts | NextTokens) -> Tensor:
        ids_T, positions_T = (
            torch.from_numpy(ids.astype(np.int64, copy=False)).to(self._model.device)
            for ids in (token_ids, position_ids)
        )
        output = self._model.get_decoder()(
            input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, decoding=step
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD


def _as_sequence(prompt_ids: Int32Array, images: tuple[PlacedImage, ...]) -> TokenSequence:
    # Which rows are wanted is not looked at; a prompt of one token has none.
    ids = prompt_ids if len(prompt_ids) > 1 else np.repeat(prompt_ids, 2)
    return TokenSequence(token_ids=ids, positions=np.zeros(1, np.int32), images=images)


def prepare_decoding(model: PreTrainedModel) -> None:
    """Give the model the attention that decoding needs, for good, when it decodes as it computes whole sequences.

    Raises:
        ConfigError: it does not; the message names the model type and the error found.
    """
    if (reason := decoding_refusal(model)) is not None:
        raise _refusal(model, reason)
    whole = _probe_sequences(model)
    try:
        with torch.inference_mode(), steady_routing(model):
            expected_TD = hidden_states_TD(model, pack(whole).to(model.device))
            model.set_attn_implementation(attention_of(model.config, CACHED_ATTENTION))
            decoded_TD = _decoded_TD(model, [sequence.token_ids for sequence in whole])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ConfigError) as error:
        raise _refusal(model, f"{type(error).__name__}: {error}") from error
    ends = np.cumsum([sequence.num_tokens for sequence in whole])
    starts = [0, *ends[:-1]]
    rows = [row for start, end in zip(starts, ends, strict=True) for row in range(start + _PROMPT - 1, end)]
    expected_RD = expected_TD[rows].float()
    difference = float((decoded_TD.float() - expected_RD).norm() / expected_RD.norm())
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_16_BITS)
    if not difference <= tolerance:  # NaN is refused too
        raise _refusal(
            model,
            f"decoded token by token, its hidden states are {difference:.2g} off, relative; "
            f"at most {tolerance:g} is rounding",
        )


_PROMPT = 3
_LENGTHS = (9, 12)


def _probe_sequences(model: PreTrainedModel) -> list[TokenSequence]:
    vocabulary_size = model.get_input_embeddings().weight.shape[0]
    ids = (np.arange(1, sum(_LENGTHS) + 1, dtype=np.int64) * 7919 % vocabulary_size).astype(np.int32)
    parts = np.split(ids, [_LENGTHS[0]])
    return [TokenSequence(token_ids=part, positions=np.zeros(1, np.int32)) for part in parts]


def _decoded_TD(model: PreTrainedModel, whole: Sequence[Int32Array]) -> Tensor:
    """Hidden states from the prompts' last tokens on, sequence by sequence; the rows end up uneven, and one leaves."""
    decoder = Decoder(model, tokens=1)
    states: list[list[Tensor]] = [[] for _ in whole]
    for ids, kept in zip(whole, states, strict=True):
        kept.append(decoder.join([ids[:_PROMPT]])[0])
        if len(decoder) == 1:
            kept.append(decoder.advance([int(ids[_PROMPT])])[0])  # a step ahead of the other
    first, second = whole
    for step in range(_PROMPT, len(first) - 1):
        hidden_BD = decoder.advance([int(first[step + 1]), int(second[step])])
        states[0].append(hidden_BD[0])
        states[1].append(hidden_BD[1])
    decoder.leave(0)
    for token in second[len(first) - 1 :]:
        states[1].append(decoder.advance([int(token)])[0])
    return torch.cat([torch.stack(kept) for kept in states])


def _refusal(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(f"model type {model.config.model_type} of {model.name_or_path} cannot be sampled from: {reason}")
