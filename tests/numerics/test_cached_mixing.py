"""Rows of layers that carry a state are decoded together as transformers decodes each alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh.models.decoding.cached_attention import Prompts
from kdmesh.models.decoding.cached_mixing import cached_mixing
from kdmesh.models.decoding.decoder import Decoder, prepare_decoding
from kdmesh.models.decoding.kv_cache import KvCache
from kdmesh.types import Int32Array
from tests.support.rollout_samples import prompt
from tests.support.tiny_models import HYBRIDS, VOCABULARY_SIZE, TinyModels

KERNEL = 4  # inputs that the convolution of a layer sees
TOLERANCE = {
    "rtol": 0,
    "atol": 1e-4,
}  # transformers itself is 4e-5 off when it decodes two rows together; they are 1 apart


class Alone:
    """One sequence by transformers' own code and cache, token by token."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager").eval()
        self.cache = DynamicCache(config=self._model.config)

    def feed(self, token_ids: Sequence[int] | Int32Array) -> Tensor:
        """[D] hidden states of the last of these."""
        begun = self.cache.get_seq_length()
        positions = torch.arange(begun, begun + len(token_ids))[None]  # which bamba does not count by itself
        with torch.no_grad():
            output = self._model.get_decoder()(
                input_ids=torch.tensor([list(token_ids)]), position_ids=positions, cache=self.cache
            )
        hidden_D: Tensor = output.last_hidden_state[0, -1]
        return hidden_D


def ids(num_tokens: int, seed: int) -> Int32Array:
    return prompt(num_tokens, seed=seed, vocabulary_size=VOCABULARY_SIZE)


def decoder(path: Path) -> Decoder:
    model = load_causal_lm(path, "auto", torch.device("cpu"))
    prepare_decoding(model)
    return Decoder(model, tokens=1)


def check_states(together: Decoder, rows: Sequence[Alone]) -> None:
    """Every recurrent layer has the same states."""
    assert together._cache._states
    for layer in together._cache._states:
        held = together._cache.states(layer, len(together))
        for row, alone in enumerate(rows):
            own = alone.cache.get_conv_state(layer), alone.cache.get_recurrent_state(layer)
            for states, expected in zip(held, (state for state in own if state is not None), strict=True):
                torch.testing.assert_close(states[row], expected[0], **TOLERANCE)


def feed(rows: Sequence[Alone], tokens: Sequence[Sequence[int] | Int32Array]) -> Tensor:
    """[rows, D]"""
    return torch.stack([alone.feed(own) for alone, own in zip(rows, tokens, strict=True)])


@pytest.mark.parametrize("family", HYBRIDS)
@torch.inference_mode()
def test_rows_that_join_and_leave_are_decoded_as_each_alone(family: str, tiny_models: TinyModels) -> None:
    path = tiny_models.path(family, linear_conv_kernel_dim=KERNEL, mamba_d_conv=KERNEL, conv_L_cache=KERNEL)
    together = decoder(path)
    rows: list[Alone] = []
    for turn, lengths in enumerate([(1, KERNEL - 1), (KERNEL, 70), (2, 130)]):
        prompts = [ids(length, seed=length) for length in lengths]
        new = [Alone(path) for _ in prompts]
        torch.testing.assert_close(together.join(prompts), feed(new, prompts), **TOLERANCE)
        rows += new
        check_states(together, rows)
        for step in range(3):
            tokens = ids(len(rows), seed=100 * turn + step).tolist()
            torch.testing.assert_close(together.advance(tokens), feed(rows, [[token] for token in tokens]), **TOLERANCE)
        together.leave(turn)  # the last, which takes its place, is another one each time
        rows[turn] = rows[-1]
        rows.pop()
        check_states(together, rows)


@torch.inference_mode()
def test_a_fork_goes_its_own_way(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen3_5_text")
    together = decoder(path)
    together.join([ids(9, seed=1)])
    together.fork(0)
    rows = [Alone(path), Alone(path)]
    feed(rows, [ids(9, seed=1)] * 2)
    check_states(together, rows)
    for step in range(3):
        tokens = ids(2, seed=step).tolist()
        torch.testing.assert_close(together.advance(tokens), feed(rows, [[token] for token in tokens]), **TOLERANCE)
    check_states(together, rows)


def test_a_layer_with_another_kind_of_cache_is_refused() -> None:
    def older(hidden_states: Tensor, *, cache_params: object = None, **kwargs: object) -> Tensor:
        return hidden_states

    prompts = Prompts(cache=KvCache(rows=1, tokens=1), rows=(0,), lengths=(5,))
    with pytest.raises(
        ConfigError, match=r"its recurrent layer leaves no state in the cache that it is given; use transformers 5\.24"
    ):
        cached_mixing(older, 0, torch.zeros(1, 5, 8), prompts)
