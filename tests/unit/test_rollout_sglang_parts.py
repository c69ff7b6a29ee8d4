"""What surrounds SGLang in the rollout server works without it: configuration, requests, draws, staged weights."""

from __future__ import annotations

import contextlib
import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdmesh.errors import ModelMismatch
from kdmesh.handles.slab.memory import create_segment
from kdmesh.models.checkpoint import open_checkpoint
from kdmesh.models.fingerprint import named_weights
from kdmesh.sglang.file_names import file_tensors, names_in_files
from kdmesh.sglang.staged_weights import StagedWeights, read_staged, staged_bytes
from kdmesh.types import DType, Sampling
from kdmesh.weights.manifest import TensorSpec
from kdmesh_rollout.sglang.ask import Ask
from kdmesh_rollout.sglang.config import SglangEngine
from kdmesh_rollout.sglang.drawing import DrawnSample, draw_rows
from tests.support.tiny_models import MIXTURES, save_model
from tests.support.tiny_vision import FAMILIES as FAMILIES_THAT_SEE
from tests.support.tiny_vision import TinyVisionModels

CPU = torch.device("cpu")


def ask(*, seed: int = 3, **sampling: Any) -> Ask:
    return Ask(sampling=Sampling(max_new_tokens=1, **sampling), seed=seed, vocabulary_size=10)


def no_text(token_ids: object) -> str:
    raise AssertionError("no stop string was asked for")


def engine(**members: object) -> SglangEngine:
    return SglangEngine.model_validate({"kind": "sglang", "model": "m"} | members)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"arguments": {"max_running_requests": 2}}, "max_running_requests cannot be given; set engine.max_running"),
        ({"arguments": {"weight_version": "x"}}, "weight_version cannot be given; the server decides it"),
        ({"arguments": {"speculative_algorithm": "EAGLE"}}, "a drafted token has no log-probability here"),
        ({"arguments": {"enable_hierarchical_cache": True}}, "new weights would be refused while it copies prefixes"),
        ({"arguments": {"tp_size": 2}}, "tp_size cannot be given; set engine.tensor_parallel instead"),
        ({"data_parallel": 2}, "Input should be 1"),
        ({"num_nodes": 2}, "Input should be 1"),
        ({"pipeline_parallel": 2}, "Input should be 1"),
        ({"max_batch_tokens": 64}, "Extra inputs are not permitted"),
    ],
)
def test_an_impossible_engine_is_refused(members: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        engine(**members)


def test_an_ask_goes_through_request_parameters() -> None:
    sent = ask(seed=2**63 - 1, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, stop_strings=("a", "\n"))
    assert Ask.from_params(json.loads(json.dumps(sent.to_params()))) == sent


@pytest.mark.parametrize("params", [None, {}, {"thinking_budget": 3}])
def test_other_peoples_requests_are_not_ours(params: dict[str, int] | None) -> None:
    assert Ask.from_params(params) is None


def test_a_place_that_is_computed_again_gets_the_same_chance() -> None:
    sample, other = DrawnSample(ask(), no_text), DrawnSample(ask(), no_text)
    chances = [sample.draw([1], [2] * place, CPU).chance for place in (0, 0, 0, 1, 2, 1)]
    assert chances[0] == chances[1] == chances[2]
    assert chances[3] == chances[5]
    assert len(set(chances)) == 3
    assert other.draw([1], [2, 2], CPU).chance == chances[4]


def test_a_penalty_sees_prompt_and_response() -> None:
    drawn = DrawnSample(ask(repetition_penalty=2.0), no_text).draw([7, 1, 7], [4, 1], CPU)
    assert drawn.seen_S is not None
    assert drawn.seen_S.tolist() == [1, 4, 7]
    assert DrawnSample(ask(), no_text).draw([7], [4], CPU).seen_S is None


def test_rows_of_the_head_that_are_no_tokens_have_no_part_in_it() -> None:
    logits_BV = torch.zeros(2, 14)
    logits_BV[:, 10:] = 50.0
    draws = [DrawnSample(ask(seed=seed), no_text).draw([1], [], CPU) for seed in (1, 2)]
    tokens_B, logprobs_B = draw_rows(logits_BV, draws, vocabulary_size=10)
    assert (tokens_B < 10).all()
    torch.testing.assert_close(logprobs_B, torch.full((2,), 0.1).log())


def test_staged_weights_are_read_as_they_were_written() -> None:
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "scalar": torch.randn((), dtype=torch.bfloat16),
        "b": torch.randn(7, dtype=torch.float32),
    }
    specs = [
        TensorSpec(name=name, shape=tuple(tensor.shape), dtype=DType(str(tensor.dtype).removeprefix("torch.")))
        for name, tensor in tensors.items()
    ]
    with contextlib.closing(create_segment(staged_bytes(specs))) as segment:
        staged = StagedWeights(specs, segment)
        for place, tensor in enumerate(tensors.values()):
            octets = tensor.reshape(-1).view(torch.uint8).numpy().data
            staged.write(place, 0, octets[:2])
            staged.write(place, 2, octets[2:])
        with mmap.mmap(segment.fd, segment.size_bytes, prot=mmap.PROT_READ) as own:
            copy = mmap.mmap(-1, segment.size_bytes)
            copy[:] = own[:]
        read = dict(read_staged(copy))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)


def test_the_plugin_loads_nothing_heavy_into_processes_that_are_not_ours() -> None:
    script = (
        "import sys; from kdmesh_rollout.sglang.plugin import register; register();"
        "print(*sorted({'torch', 'sglang', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("family", [*MIXTURES, "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_weights_get_the_names_and_values_of_their_files(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, family, seed=0, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    names = names_in_files(named_weights(checkpoint.skeleton), checkpoint.shapes())
    assert all(name == known for name, known in names.items()) == (family != "mixtral")
    weights = named_weights(model)
    own = {n: part for name, tensor in weights.items() for n, part in file_tensors(names[name], tensor, weights)}
    in_file = load_file(tmp_path / "model.safetensors")
    assert own.keys() == in_file.keys()
    assert all(torch.equal(own[name], in_file[name]) for name in own)


def test_experts_that_files_hold_together_are_known_by_that_name() -> None:
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert names_in_files({name: torch.empty(4, 6, 3)}, {name: (4, 6, 3)}) == {name: name}


@pytest.mark.parametrize("in_files", [{"a": (2, 3)}, {"a": (2, 3), "b": (1, 3)}])
def test_tensors_that_files_hold_otherwise_are_refused(in_files: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ModelMismatch, match=r"its files hold b \(1 in all\)"):
        names_in_files({"a": torch.empty(2, 3), "b": torch.empty(3, 1)}, in_files)


@pytest.mark.parametrize("family", FAMILIES_THAT_SEE)
def test_weights_of_a_model_that_reads_images_get_the_names_of_its_files(
    family: str, tiny_vision: TinyVisionModels
) -> None:
    checkpoint = open_checkpoint(tiny_vision.path(family))
    weights = named_weights(checkpoint.skeleton)
    names = names_in_files(weights, checkpoint.shapes())
    sent = {name for own, tensor in weights.items() for name, _ in file_tensors(names[own], tensor, weights)}
    assert sent == set(checkpoint.shapes())


def test_the_token_that_is_never_drawn_has_its_probability_all_the_same() -> None:
    logits_BV = torch.zeros(2, 10)
    logits_BV[:, 4] = 50.0
    sent = Ask(sampling=Sampling(max_new_tokens=1, temperature=0), seed=1, vocabulary_size=10, never=4)
    assert Ask.from_params(json.loads(json.dumps(sent.to_params()))) == sent
    sample = DrawnSample(sent, no_text)
    draws = [sample.draw([1], [], CPU) for _ in range(2)]
    tokens_B, logprobs_B = draw_rows(logits_BV, draws, vocabulary_size=10, never=sample.never)
    assert (tokens_B != 4).all()
    assert (logprobs_B < -49).all()
