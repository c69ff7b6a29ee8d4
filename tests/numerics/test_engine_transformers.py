"""The transformers engine writes Hugging Face's own hidden states; in deterministic mode, always the same bits."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.models.packing import PackedTokens
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import DType, TokenSequence
from kdmesh_teacher import config, transformers_engine
from kdmesh_teacher.engine import PrefillJob
from kdmesh_teacher.transformers_engine import TransformersEngine
from tests.support.relative_error import relative_error
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

LENGTHS = (33, 2, 90, 7, 64, 2, 3)
HIDDEN = 32


def engine(path: Path, **settings: Any) -> TransformersEngine:
    made = TransformersEngine(config.TransformersEngine(model=path, device="cpu", **settings))
    made.load()
    return made


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[TokenSequence]:
    return random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed)


def prefill(
    runner: TransformersEngine,
    groups: Sequence[Sequence[TokenSequence]],
    dtype: torch.dtype = torch.float32,
    *,
    layers: Sequence[tuple[int, ...]] | None = None,
) -> list[Tensor]:
    """The rows of each group, with the outputs of its layers, asked for as one job each, in one call."""
    layers = layers or [()] * len(groups)
    outs = [
        torch.zeros(sum(s.num_rows for s in group), HIDDEN * (1 + len(chosen)), dtype=dtype)
        for group, chosen in zip(groups, layers, strict=True)
    ]
    runner.prefill(
        [
            PrefillJob(
                sequences=tuple(group), out=memoryview(out.view(torch.uint8).numpy().data).cast("B"), layers=chosen
            )
            for group, out, chosen in zip(groups, outs, layers, strict=True)
        ]
    )
    return outs


def expected_rows(
    path: Path, group: Sequence[TokenSequence], attention: str = "eager", *, layers: Sequence[int] = ()
) -> Tensor:
    """Of layers below the last: what Hugging Face tells of that is after the final norm."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=attention).eval()
    rows = []
    with torch.no_grad():
        for s in group:
            told = model(input_ids=torch.from_numpy(s.token_ids).long()[None], output_hidden_states=True).hidden_states
            states_TC = torch.cat([told[layer][0] for layer in (-1, *layers)], 1)
            rows.append(states_TC.index_select(0, torch.from_numpy(s.positions).long()))
    return torch.cat(rows)


@pytest.mark.parametrize("row_tokens", [1, 70, 2048])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "qwen3_moe", "deepseek_v3"])
def test_rows_equal_hugging_face_alone_or_together(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, family: str, row_tokens: int
) -> None:
    monkeypatch.setattr(transformers_engine, "_CPU_ROW_TOKENS", row_tokens)
    path = tiny_models.path(family)
    runner = engine(path)
    one, two, three, *more = sequences()
    groups = [[one, two], [three], more]
    together = prefill(runner, groups)
    for group, rows in zip(groups, together, strict=True):
        expected = expected_rows(path, group)
        alone = torch.cat([prefill(runner, [[sequence]])[0] for sequence in group])
        for row, lone, wanted in zip(rows, alone, expected, strict=True):
            assert relative_error(row, wanted) < 1e-5
            assert relative_error(lone, wanted) < 1e-5


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "deepseek_v3", "gpt_oss", "qwen3_5_text", "olmo_hybrid"])
def test_outputs_of_layers_equal_hugging_face_whatever_others_ask_for(
    tiny_models: TinyModels, family: str, is_deterministic: bool
) -> None:
    kinds = tiny_models.path(family).joinpath("config.json").read_text()
    more = {"layer_types": json.loads(kinds)["layer_types"] * 2} if "layer_types" in json.loads(kinds) else {}
    path = tiny_models.path(family, num_hidden_layers=4, **more)
    runner = engine(path, deterministic=is_deterministic)
    one, two, three, *others = sequences()
    groups = [[one, two], [three], others]
    final = prefill(runner, groups)
    for layers in ([(1, 3), (), (2,)], [(1, 2, 3, 4), (4,), (3,)]):
        for group, chosen, rows, without in zip(
            groups, layers, prefill(runner, groups, layers=layers), final, strict=True
        ):
            assert torch.equal(rows[:, :HIDDEN], without)
            below = tuple(layer for layer in chosen if layer < 4)
            columns = rows[:, : HIDDEN * (1 + len(below))]
            for part, wanted in zip(
                columns.split(HIDDEN, 1), expected_rows(path, group, layers=below).split(HIDDEN, 1), strict=True
            ):
                assert relative_error(part, wanted) < 1e-5


def test_rows_are_put_together_on_a_gpu_as_they_are_on_the_cpu(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(tiny_models.path(num_hidden_layers=4))
    one, two, three, *others = sequences()
    groups, layers = [[one, two], [three], others], [(1, 3), (), (2, 4)]
    on_cpu = prefill(runner, groups, layers=layers)
    monkeypatch.setattr(transformers_engine, "_select_rows", transformers_engine._copy_rows)
    assert all(map(torch.equal, prefill(runner, groups, layers=layers), on_cpu))


def test_the_last_layers_output_is_before_the_final_norm(tiny_models: TinyModels) -> None:
    path = tiny_models.path()
    runner = engine(path)
    (rows,) = prefill(runner, [sequences()], layers=[(2,)])
    norm = AutoModelForCausalLM.from_pretrained(path).get_decoder().norm
    assert relative_error(norm(rows[:, HIDDEN:]).detach(), rows[:, :HIDDEN]) < 1e-6


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_bfloat16_stays_bfloat16(tiny_models: TinyModels, is_deterministic: bool) -> None:
    path = tiny_models.path(dtype=torch.bfloat16)
    runner = TransformersEngine(config.TransformersEngine(model=path, device="cpu", deterministic=is_deterministic))
    assert runner.load().dtype is DType.BFLOAT16
    (rows,) = prefill(runner, [sequences()], torch.bfloat16)
    assert relative_error(rows, expected_rows(path, sequences(), "sdpa")) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_deterministic_rows_are_the_same_bits_whatever_else_is_served(
    tiny_models: TinyModels, family: str, dtype: torch.dtype
) -> None:
    runner = engine(tiny_models.path(family, dtype=dtype), deterministic=True)
    mine = sequences()
    expected = [prefill(runner, [[sequence]], dtype)[0] for sequence in mine]
    others = sequences([5, 120, 31], seed=1)
    for served in (mine, mine[::-1], [others[0], *mine, others[1]], [*others, *mine[3:], *mine[:3]]):
        for actual in (
            dict(zip(map(id, served), prefill(runner, [[s] for s in served], dtype), strict=True)),
            dict(zip(map(id, served), split(prefill(runner, [served], dtype)[0], served), strict=True)),
        ):
            assert all(torch.equal(actual[id(s)], rows) for s, rows in zip(mine, expected, strict=True))


def split(rows: Tensor, group: Sequence[TokenSequence]) -> Sequence[Tensor]:
    return rows.split([sequence.num_rows for sequence in group])


def test_deterministic_rows_are_the_same_bits_after_a_new_load(tiny_models: TinyModels) -> None:
    first, second = (engine(tiny_models.path(), deterministic=True) for _ in range(2))
    assert torch.equal(prefill(first, [sequences()])[0], prefill(second, [sequences()[::-1], sequences()])[1])


def test_rows_land_in_the_given_bytes_and_nowhere_else(tiny_models: TinyModels) -> None:
    runner = engine(tiny_models.path())
    group = sequences()
    (expected,) = prefill(runner, [group])
    memory = bytearray(b"\xaa" * (expected.nbytes + 192))
    runner.prefill([PrefillJob(sequences=tuple(group), out=memoryview(memory)[64 : 64 + expected.nbytes])])
    assert memory[64:-128] == expected.numpy().tobytes()
    assert memory[:64] + memory[-128:] == b"\xaa" * 192


def test_nothing_keeps_the_buffer(tiny_models: TinyModels) -> None:
    runner = engine(tiny_models.path())
    (sequence,) = sequences([5])
    out = memoryview(bytearray(sequence.num_rows * HIDDEN * 4))
    job = PrefillJob(sequences=(sequence,), out=out)
    runner.prefill([job])
    kept = weakref.ref(out)
    del out, job
    gc.collect()
    assert kept() is None


def test_packed_rows_are_filled_up_to_the_cap_in_order(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine(tiny_models.path())
    seen: list[tuple[int, ...]] = []
    compute = transformers_engine.hidden_states_TD

    def recorded(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
        seen.append(packed.lengths)
        return compute(model, packed)

    monkeypatch.setattr(transformers_engine, "hidden_states_TD", recorded)
    monkeypatch.setattr(transformers_engine, "_CPU_ROW_TOKENS", 70)
    prefill(runner, [[sequence] for sequence in sequences([33, 37, 2, 90, 60, 8, 3])])
    assert seen == [(33, 37), (2,), (90,), (60, 8), (3,)]


def test_no_job_is_no_work(tiny_models: TinyModels) -> None:
    engine(tiny_models.path()).prefill([])


def test_the_description_says_what_was_loaded(tiny_models: TinyModels) -> None:
    path = tiny_models.path(vocab_size=VOCABULARY_SIZE + 64)
    made = TransformersEngine(config.TransformersEngine(model=path, device="cpu", max_batch_tokens=1000)).load()
    assert (made.name, made.hidden_size, made.dtype) == (path.name, HIDDEN, DType.FLOAT32)
    assert (made.head.vocabulary_size, made.head.padded_vocabulary_size) == (VOCABULARY_SIZE, VOCABULARY_SIZE + 64)
    assert made.num_layers == 2
    assert (made.max_sequence_tokens, made.max_batch_tokens) == (256, 1000)  # the model's positions; ours
    assert not made.is_deterministic


def test_weights_that_no_message_carries_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_models.path(), dtype=torch.float64).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has weights of torch\.float64; set engine\.dtype to float32 or bfloat16"):
        engine(tmp_path)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 16.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 8.0, 20.0],
    "original_max_position_embeddings": 16,
}


def test_sequences_are_no_longer_than_changes_no_other(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama", rope_parameters=LONGROPE)
    for deterministic, longest in ((False, 16), (True, 256)):
        told = config.TransformersEngine(model=path, device="cpu", max_batch_tokens=1000, deterministic=deterministic)
        assert TransformersEngine(told).load().max_sequence_tokens == longest


def test_the_tokenizer_is_named_or_absent(tiny_models: TinyModels) -> None:
    def describe(path: Path) -> Any:
        return TransformersEngine(config.TransformersEngine(model=path, device="cpu", max_batch_tokens=64)).load()

    with_tokenizer, without = describe(tiny_models.path()), describe(tiny_models.path(tokenizer=False))
    vocabulary = transformers_engine.load_tokenizer(tiny_models.path()).get_vocab()
    assert with_tokenizer.tokenizer_fingerprint == tokenizer_fingerprint(vocabulary)
    assert without.tokenizer_fingerprint == ""
    assert without.head.vocabulary_size == without.head.padded_vocabulary_size
    assert with_tokenizer.model_fingerprint == without.model_fingerprint
    assert without.max_sequence_tokens == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_the_heads_bytes_are_its_weights(tiny_models: TinyModels, family: str, dtype: torch.dtype) -> None:
    path = tiny_models.path(family, dtype=dtype)
    parts = engine(path).head_parts()
    own = AutoModelForCausalLM.from_pretrained(path, dtype="auto").get_output_embeddings()
    assert parts.weight.readonly and parts.dtype == str(dtype).removeprefix("torch.")
    assert bytes(parts.weight) == own.weight.detach().view(torch.uint8).numpy().tobytes()
    assert (parts.bias is None) == (own.bias is None)
    if parts.bias is not None:
        assert bytes(parts.bias) == own.bias.detach().view(torch.uint8).numpy().tobytes()


def test_a_missing_gpu_is_refused(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device is cuda"):
        TransformersEngine(config.TransformersEngine(model=tiny_models.path(), device="cuda")).load()


def test_a_dtype_that_cannot_be_sent_is_refused(tiny_models: TinyModels) -> None:
    with pytest.raises(ConfigError, match=r"torch\.float64.*set engine\.dtype"):
        engine(tiny_models.path(dtype=torch.float64))


def test_the_configured_threads_are_used(tiny_models: TinyModels) -> None:
    before = torch.get_num_threads()
    try:
        engine(tiny_models.path(), threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
