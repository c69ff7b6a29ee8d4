"""What a run is said to need, against arithmetic and against what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kdmesh.errors import ConfigError
from kdmesh.models.images.vision import unused_vision, vision_parts
from kdmesh_trainer.commands.plan import at_worst
from kdmesh_trainer.memory.job import Job, TeacherHead
from kdmesh_trainer.memory.memory_plan import plan
from kdmesh_trainer.sections.layers_config import LayersConfig
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.sections.teacher_config import FollowConfig
from tests.support.measured_step import TEACHER_SIZE, Step
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_models import FAMILIES, HYBRID_MIXTURES, MIXTURES, VOCABULARY_SIZE, TinyModels
from tests.support.tiny_vision import TinyVisionModels, reader_of
from tests.support.tiny_vision_tokens import VOCABULARY_SIZE as VISION_VOCABULARY
from tests.support.trainer_ranks import finish, start_ranks

TINY: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
DEEP: dict[str, Any] = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
# Whose matrices are most of what a step takes.
BROAD: dict[str, Any] = {"vocab_size": 300, "hidden_size": 512, "intermediate_size": 16384, "num_hidden_layers": 1}
WIDE: dict[str, Any] = {"vocab_size": 64_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def saved(directory: Path, shape: dict[str, Any], *, is_tied: bool) -> Path:
    """The configuration of a Qwen3, or of the `model_type` that `shape` names, without weights."""
    config = AutoConfig.for_model(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape["hidden_size"] // 4,
        tie_word_embeddings=is_tied,
        **{"model_type": "qwen3", **shape},
    )
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(directory)
    return directory


def job(model: Path, vocabulary: int, lengths: list[int], *, accumulates: bool = False) -> Job:
    return Job(
        student=model,
        vocabulary_size=vocabulary,
        teachers=[TeacherHead(hidden_size=TEACHER_SIZE, dtype=torch.float32)],
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(),
        ranks=1,
        lengths=lengths,
        accumulates=accumulates,
    )


def test_weights_moments_and_head_are_counted_to_the_byte_and_shared_by_the_ranks(tmp_path: Path) -> None:
    alone = job(saved(tmp_path, TINY, is_tied=False), 300, [40, 24])
    parameters = 2 * 300 * 64 + 64 + 2 * (2 * 64 + 2 * 16 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    found = plan(alone)
    assert found.resident["parameters"] == pytest.approx(4 * parameters, rel=2e-3)  # and a few tables of angles
    assert found.resident["AdamW"] == pytest.approx(8 * parameters, rel=2e-3)
    assert found.resident["teacher's head"] == 4 * 300 * TEACHER_SIZE
    of_four = plan(replace(alone, ranks=4))
    assert of_four.resident["AdamW"] == pytest.approx(found.resident["AdamW"] / 4, rel=2e-3)
    assert of_four.resident["parameters"] == pytest.approx(found.resident["parameters"] / 4, rel=2e-2)


def test_one_rank_keeps_a_copy_in_the_type_that_it_computes_in_and_none_in_the_weights_own(tmp_path: Path) -> None:
    alone = job(saved(tmp_path, TINY, is_tied=False), 300, [40, 24])
    whole = plan(alone).resident["parameters"]
    assert "gathered parameters" not in plan(alone).phases["backward"]
    found = plan(replace(alone, compute_dtype=torch.bfloat16))
    assert found.resident["parameters"] == whole
    assert found.resident["gathered parameters"] == pytest.approx(whole / 2, rel=2e-3)
    assert found.phases["AdamW"]["gradients"] == pytest.approx(whole, rel=2e-2)  # in float32, of every parameter


def test_what_several_copies_and_the_host_keep_is_counted_there(tmp_path: Path) -> None:
    one = replace(job(saved(tmp_path, TINY, is_tied=False), 300, [40, 24]), ranks=4, device=torch.device("cuda"))
    trained = 4 * (2 * 300 * 64 + 64 + 2 * (2 * 64 + 2 * 16 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128))
    found = plan(replace(one, shard_ranks=2, offloads=True))
    for name, times in {"parameters": 1, "gradients": 1, "AdamW": 2}.items():
        assert found.host[name] == pytest.approx(times * trained / 2, rel=2e-2), name
    assert found.resident["AdamW"] == 0
    assert found.resident["parameters"] < 0.02 * trained  # tables of angles
    assert 0 < found.phases["backward"]["copies of shards"] < trained / 2
    assert not replace(one, offloads=True, device=torch.device("cpu")).uses_host


def test_twice_the_tokens_take_twice_the_activations(tmp_path: Path) -> None:
    model = saved(tmp_path, TINY, is_tied=True)
    few, many = (plan(job(model, 300, [64] * count)).phases["forward"]["activations"] for count in (2, 4))
    assert many == pytest.approx(2 * few, rel=0.02)


def test_a_head_that_is_the_embedding_is_counted_once(tmp_path: Path) -> None:
    tied, apart = (
        plan(job(saved(tmp_path / str(is_tied), WIDE, is_tied=is_tied), 64_000, [64])) for is_tied in (True, False)
    )
    for what, copies in (("parameters", 1), ("AdamW", 2)):
        assert apart.resident[what] - tied.resident[what] == pytest.approx(copies * 4 * 64_000 * 256, rel=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_that_is_spread_over_four_ranks_takes_a_quarter_on_each(tmp_path: Path, is_tied: bool) -> None:
    alone = replace(job(saved(tmp_path, WIDE, is_tied=is_tied), 63_000, [40, 24]), ranks=4)
    whole, spread = plan(alone), plan(replace(alone, spreads_head=True))
    assert spread.resident["teacher's head"] == 4 * 16_000 * TEACHER_SIZE
    assert spread.resident["parameters"] == pytest.approx(whole.resident["parameters"], rel=1e-3)
    assert spread.resident["AdamW"] == pytest.approx(whole.resident["AdamW"], rel=1e-3)
    head_bytes = 4 * 64_000 * 256  # gathered for the forward pass; one that is tied not even for the embedding
    saved_bytes = (whole.phases["forward"] - spread.phases["forward"])["gathered parameters"]
    assert saved_bytes == pytest.approx(head_bytes, rel=0.01)
    # Nor is its whole gradient there. The logits are of four ranks' rows and a quarter of the tokens, which is as much.
    assert (whole.phases["backward"].total() - spread.phases["backward"].total()) > head_bytes
    assert spread.phases["forward"]["loss"] <= 1.02 * whole.phases["forward"]["loss"]


def test_ranks_that_hold_a_micro_batch_together_share_its_activations_and_all_share_the_weights(tmp_path: Path) -> None:
    alone = replace(job(saved(tmp_path, TINY, is_tied=True), 300, [512]), ranks=4)
    found, halved = (plan(replace(alone, context=context)) for context in (1, 2))
    assert halved.resident["AdamW"] == found.resident["AdamW"]
    # Of the longest slice; key heads and copies for the exchange keep it from being half.
    assert 0.5 <= halved.phases["forward"]["activations"] / found.phases["forward"]["activations"] < 0.6
    assert halved.phases["forward"]["loss"] < 0.6 * found.phases["forward"]["loss"]


def test_keys_of_a_sequence_that_begins_on_another_rank_are_counted(tmp_path: Path) -> None:
    model = saved(tmp_path, TINY, is_tied=True)
    whole, quarters = (
        plan(replace(job(model, 300, lengths), ranks=4, context=4, exchange="keys")).phases["forward"]["activations"]
        for lengths in ([1024], [256] * 4)
    )
    text = AutoConfig.from_pretrained(model)
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim * 768 * 4 * text.num_hidden_layers
    # Where attention is computed again, its outputs are not kept.
    assert 0.5 * keys_and_values < whole - quarters <= keys_and_values


def test_layers_of_which_inputs_alone_are_kept_take_little_until_the_backward_pass(tmp_path: Path) -> None:
    model = saved(tmp_path, {**TINY, "num_hidden_layers": 8}, is_tied=True)
    kept, half, none = (
        plan(replace(job(model, 300, [512]), checkpointed_every=every)).phases["forward"]["activations"]
        for every in (None, 2, 1)
    )
    assert 0.4 * kept < half < 0.7 * kept
    assert none < 0.25 * kept


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_what_is_frozen_beside_adapters_has_no_moments_and_rests_as_in_its_files(
    tmp_path: Path, frozen: torch.dtype
) -> None:
    whole = job(saved(tmp_path, TINY, is_tied=True), 300, [40, 24])
    found = plan(replace(whole, lora=LoraConfig(rank=4), frozen_dtype=frozen))
    size, inner, keys = 64, 128, 32
    trained = 2 * 4 * (2 * (size + size) + 2 * (size + keys) + 3 * (size + inner))
    assert found.resident["AdamW"] == pytest.approx(8 * trained, rel=1e-2)
    all_in_float32 = plan(whole).resident["parameters"]
    assert found.resident["parameters"] == pytest.approx(all_in_float32 * frozen.itemsize / 4 + 4 * trained, rel=1e-2)


@pytest.mark.parametrize(
    ("every", "decay", "copies"), [(1, None, 0), (1, 0.9, 1), (2, None, 1), (2, 0.9, 2)]
)  # the average, and what was sent last where that is not the newest
def test_what_a_teacher_that_follows_the_student_is_to_have_is_counted(
    tmp_path: Path, every: int, decay: float | None, copies: int
) -> None:
    follows = FollowConfig(every=every, decay=decay)
    one = replace(job(saved(tmp_path, TINY, is_tied=False), 300, [40, 24]), follows=follows)
    trained = 4 * (2 * 300 * 64 + 64 + 2 * (2 * 64 + 2 * 16 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128))
    assert plan(one).resident["teacher's weights"] == copies * trained
    of_four = plan(replace(one, ranks=4)).resident["teacher's weights"]
    assert of_four == pytest.approx(copies * trained / 4, rel=2e-2)
    on_host = plan(replace(one, ranks=2, offloads=True, device=torch.device("cuda")))
    assert on_host.host["teacher's weights"] == pytest.approx(copies * trained / 2, rel=2e-2)
    assert not on_host.resident["teacher's weights"]
    with_adapters = plan(replace(one, lora=LoraConfig(rank=4), frozen_dtype=torch.bfloat16))
    matrices = 4 * 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    assert with_adapters.resident["teacher's weights"] == copies * matrices  # those that change, added up


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_compared_take_their_maps_and_a_gradient_of_each_until_the_backward_pass(
    tmp_path: Path, width: int, dtype: torch.dtype
) -> None:
    teacher = TeacherHead(hidden_size=width, dtype=dtype)
    without = replace(job(saved(tmp_path, TINY, is_tied=True), 300, [2048]), teachers=[teacher], compute_dtype=dtype)
    pairs = {1: 2, 2: 5}
    found, compared = plan(without), plan(replace(without, layers=LayersConfig(pairs=pairs, weight=1)))
    maps = 2 * 64 * 96 if width == 96 else 0
    assert compared.resident["AdamW"] - found.resident["AdamW"] == pytest.approx(8 * maps, rel=1e-3)
    assert compared.resident["parameters"] - found.resident["parameters"] == 4 * maps
    kept, rows = (count * 2047 * width * dtype.itemsize for count in (2, 3))  # of each pair; of the teacher
    more = (compared.phases["forward"] - found.phases["forward"])["loss"]
    assert kept <= more < 3 * (kept + rows)
    of_two = plan(replace(without, layers=LayersConfig(pairs=pairs, weight=1), ranks=2))
    assert of_two.resident["AdamW"] == pytest.approx(compared.resident["AdamW"] / 2, rel=1e-2)
    unknown = replace(without, layers=LayersConfig(pairs=pairs, weight=1), teachers=[])
    assert plan(unknown).resident["AdamW"] == found.resident["AdamW"]


MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
}


HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}

MAMBA: dict[str, Any] = {
    "model_type": "bamba",
    "attn_layer_indices": [3, 7],
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
}

CONVOLUTIONS: dict[str, Any] = {"model_type": "lfm2", "layer_types": ["conv", "conv", "conv", "full_attention"] * 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*MIXTURES, *HYBRID_MIXTURES])
def test_a_mixture_is_counted_with_all_its_experts_and_what_each_token_takes_of_them(
    tiny_models: TinyModels, family: str, dtype: torch.dtype
) -> None:
    model = tiny_models.path(family)
    alone = replace(job(model, VOCABULARY_SIZE, [64]), compute_dtype=dtype)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    found, of_two = plan(alone), plan(replace(alone, ranks=2))
    assert found.resident["AdamW"] == pytest.approx(8 * parameters, rel=5e-3)
    assert of_two.resident["AdamW"] == pytest.approx(found.resident["AdamW"] / 2, rel=1e-2)
    # However many experts there are, each token goes to two.
    more = {name: 2 * count for name, count in FAMILIES[family].items() if name in _COUNTS_OF_EXPERTS}
    twice = replace(alone, student=tiny_models.path(family, **more))
    activations = plan(twice).phases["forward"]["activations"]
    assert activations == pytest.approx(found.phases["forward"]["activations"], rel=0.05)


_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def test_a_mixture_whose_experts_come_one_after_the_other_cannot_be_planned(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "jetmoe", {"num_local_experts": 4})
    with pytest.raises(ConfigError, match=r"jetmoe.* cannot be planned without memory: its layers look at values"):
        plan(job(tiny_models.path("jetmoe"), VOCABULARY_SIZE, [64]))


def test_muon_keeps_one_moment_of_a_matrix_and_takes_one_whole_matrix_at_a_time(tmp_path: Path) -> None:
    shape = {**TINY, "hidden_size": 128, "intermediate_size": 4096}
    alone = replace(job(saved(tmp_path, shape, is_tied=False), 300, [40]), optimizer=OptimizerConfig(name="muon"))
    matrices = 2 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 4096)
    rest = 2 * 300 * 128 + 128 + 2 * (2 * 128 + 2 * 32)
    for ranks in (1, 4):
        found = plan(replace(alone, ranks=ranks))
        resident = found.resident["Muon"]
        assert resident == pytest.approx((4 * matrices + 8 * rest) / ranks, rel=1e-2)
        whole = 4 * 128 * 4096
        assert 2 * whole <= found.phases["Muon"]["Muon"] - resident < 6 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_student_has_one_matrix_more_at_a_time_and_keeps_none(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = replace(job(saved(tmp_path, BROAD, is_tied=True), 300, [64]), compute_dtype=dtype)
    rounded = replace(plain, quantization=QuantizationConfig(weights="int4", group_size=32))
    found, without = plan(rounded), plan(plain)
    assert found.resident == without.resident
    matrix = 4 * 512 * 16384
    more = found.phases["forward"].total() - without.phases["forward"].total()
    copies = 1 if dtype == torch.float32 else 2  # bfloat16 is divided and rounded in float32
    assert copies * matrix * 0.9 < more < (copies + 0.2) * matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_by_name_has_neither_gradient_nor_moments(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = job(saved(tmp_path, TINY, is_tied=False), 300, [40, 24])
    found = plan(replace(whole, freeze=("model.embed_tokens", "model.layers"), frozen_dtype=dtype))
    head, layers = 300 * 64, 2 * (2 * 64 + 2 * 16 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    trained = head + 64
    assert found.resident["AdamW"] == pytest.approx(8 * trained, rel=1e-2)
    assert found.resident["parameters"] == pytest.approx(4 * trained + dtype.itemsize * (head + layers), rel=1e-2)
    assert found.phases["AdamW"]["gradients"] == pytest.approx(4 * trained, rel=2e-2)
    headless = plan(replace(whole, freeze=("lm_head",))).phases["forward"]["loss"]
    assert plan(whole).phases["forward"]["loss"] - headless == 4 * head  # the fused loss makes it in the forward pass
    for ranks in (2, 4):
        assert plan(replace(whole, freeze=("model.layers",), ranks=ranks)).resident["AdamW"] == pytest.approx(
            8 * (2 * head + 64) / ranks, rel=1e-2
        )


def of_first_rank(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Numbers that it holds: a tensor is cut along its first dimension, and one that has but one row is whole there."""
    return sum(-(-parameter.shape[0] // ranks) * parameter[0].numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *product(["qwen2_5_vl", "qwen3_vl"], [torch.float32, torch.bfloat16]),
        *product(ROW_FAMILIES, [torch.float32]),
    ],
)
def test_a_vision_tower_has_gradients_and_moments_where_it_learns_and_none_where_not(
    tiny_vision: TinyVisionModels, family: str, dtype: torch.dtype
) -> None:
    path = tiny_vision.path(family)
    lm = AutoModelForImageTextToText.from_pretrained(path)
    reader = reader_of(path)
    unseen = [] if family.startswith("qwen") else unused_vision(lm, reader.blank()[1])
    assert bool(unseen) is family.startswith("llava")
    tower = {id(parameter) for parameter in vision_parts(lm)[1]}
    text = [parameter for parameter in lm.parameters() if id(parameter) not in tower]
    tower -= {id(parameter) for parameter in unseen}
    seen = [parameter for parameter in lm.parameters() if id(parameter) in tower]
    text_alone = replace(job(path, VISION_VOCABULARY, [40, 24], accumulates=True), compute_dtype=dtype)
    for ranks in (1, 2):
        frozen, trained = (plan(replace(text_alone, ranks=ranks, trains_vision=is_it)) for is_it in (False, True))
        assert frozen.resident["AdamW"] == pytest.approx(8 * of_first_rank(text, ranks), rel=2e-3)
        assert trained.resident["AdamW"] == pytest.approx(8 * of_first_rank([*text, *seen], ranks), rel=2e-3)
        assert trained.resident["parameters"] == frozen.resident["parameters"]
        more = trained.phases["AdamW"]["gradients"] - frozen.phases["AdamW"]["gradients"]
        assert more == pytest.approx(4 * of_first_rank(seen, ranks), rel=1e-2)
        assert frozen.phases["AdamW"]["gradients"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("shape", "is_tied", "step"),
    [
        (DEEP, False, Step(vocabulary=4000, length=512, sequences=4)),
        (WIDE, True, Step(vocabulary=64_000, length=512, sequences=4)),
        (WIDE, True, Step(vocabulary=64_000, length=256, sequences=12, micro_batches=2)),
        (DEEP, False, Step(vocabulary=4000, length=512, sequences=4, checkpointed_every=1, returns_freed=True)),
        (DEEP, False, Step(vocabulary=4000, length=512, sequences=4, lora_rank=16, returns_freed=True)),
        (
            DEEP,
            False,
            Step(vocabulary=4000, length=512, sequences=4, lora_rank=16, lora_base="nf4", returns_freed=True),
        ),
        (
            BROAD,
            False,
            Step(
                vocabulary=300,
                length=64,
                sequences=2,
                quantization={"weights": "int4", "group_size": 32},
                returns_freed=True,
            ),
        ),
        # What the allocator keeps between blocks of every size, as experts take them, is not said.
        (DEEP | MIXTURE, False, Step(vocabulary=4000, length=512, sequences=4, returns_freed=True)),
        (DEEP | HYBRID, False, Step(vocabulary=4000, length=512, sequences=4, returns_freed=True)),
        (DEEP | MAMBA, False, Step(vocabulary=4000, length=512, sequences=2, returns_freed=True)),
        (DEEP | MAMBA, False, Step(vocabulary=4000, length=300, sequences=2, checkpointed_every=1, returns_freed=True)),
        (DEEP | CONVOLUTIONS, False, Step(vocabulary=4000, length=512, sequences=4, returns_freed=True)),
        (WIDE, False, Step(vocabulary=64_000, length=512, sequences=4, frozen=("model.embed_tokens", "lm_head"))),
    ],
)
def test_a_step_on_a_cpu_takes_what_was_said_within_a_tenth(
    shape: dict[str, Any], is_tied: bool, step: Step, tmp_path: Path
) -> None:
    tiny, model = saved(tmp_path / "tiny", TINY, is_tied=False), saved(tmp_path / "model", shape, is_tied=is_tied)
    command = [sys.executable, "-m", "tests.support.measured_step", tiny, model, json.dumps(asdict(step))]
    measured = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    wanted = replace(
        job(model, step.vocabulary, [step.length] * step.sequences, accumulates=step.micro_batches > 1),
        checkpointed_every=step.checkpointed_every,
        lora=None if step.lora_rank is None else LoraConfig(rank=step.lora_rank, base=step.lora_base),
        quantization=None if step.quantization is None else QuantizationConfig(**step.quantization),
        freeze=step.frozen,
    )
    found = plan(wanted)
    at_once = found.phases[found.worst_phase] if step.returns_freed else at_worst(found, "cpu")
    planned = at_once.total()
    assert planned == pytest.approx(measured, rel=0.1), json.dumps({"planned": planned, "measured": measured})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_tied", [True, False])
def test_two_ranks_take_what_was_said_within_a_tenth_with_a_spread_head_and_a_whole_one(
    tmp_path: Path, is_tied: bool
) -> None:
    vocabulary = 80_000  # half a matrix is more than 32 MiB, below which the allocator keeps what is freed
    shape = {**WIDE, "vocab_size": vocabulary}
    tiny, model = saved(tmp_path / "tiny", TINY, is_tied=is_tied), saved(tmp_path / "model", shape, is_tied=is_tied)
    wanted = replace(job(model, vocabulary, [256] * 2), ranks=2)
    measured, planned = {}, {}
    for spreads in (False, True):
        step = Step(vocabulary=vocabulary, length=256, sequences=2, spreads_head=spreads)
        command = ["-m", "tests.support.measured_step", str(tiny), str(model), json.dumps(asdict(step))]
        outcomes = finish(start_ranks(command, ranks=2), within_s=400)
        assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
        measured[spreads] = max(int(outcome.output) for outcome in outcomes)
        planned[spreads] = at_worst(plan(replace(wanted, spreads_head=spreads)), "cpu").total()
    assert planned == pytest.approx(measured, rel=0.1)
    assert measured[True] < 0.85 * measured[False]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_copies_of_two_ranks_take_what_was_said_within_a_tenth(tmp_path: Path) -> None:
    vocabulary = 80_000
    shape = {**WIDE, "vocab_size": vocabulary}
    tiny, model = saved(tmp_path / "tiny", TINY, is_tied=True), saved(tmp_path / "model", shape, is_tied=True)
    step = Step(vocabulary=vocabulary, length=256, sequences=2, shard_ranks=2)
    command = ["-m", "tests.support.measured_step", str(tiny), str(model), json.dumps(asdict(step))]
    outcomes = finish(start_ranks(command, ranks=4), within_s=800)
    assert [outcome.exit_code for outcome in outcomes] == [0] * 4, outcomes
    measured = max(int(outcome.output) for outcome in outcomes)
    found = plan(replace(job(model, vocabulary, [256] * 2), ranks=4, shard_ranks=2))
    planned = at_worst(found, "cpu").total()
    assert planned == pytest.approx(measured, rel=0.1), json.dumps({"planned": planned, "measured": measured})
