"""What surrounds SGLang in a server works without it: configuration, messages, selection of rows, versions."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdmesh.errors import ConfigError
from kdmesh.sglang.messages import Adopt, Adopted, Drop, Hello, Message, pack, unpack
from kdmesh.sglang.segments import Segments
from kdmesh.sglang.versions import require_tested_version
from kdmesh.types import DType, TokenSequence
from kdmesh_teacher.sglang.ask import Ask, layers_asked
from kdmesh_teacher.sglang.config import SglangEngine
from kdmesh_teacher.sglang.rows import RowProgress
from kdmesh_teacher.sglang.sharing import Request, waves

POSITIONS = st.lists(st.integers(0, 60), min_size=1, max_size=40, unique=True).map(sorted)


def ask(positions: list[int], *, segment: int = 1, offset_bytes: int = 0) -> Ask:
    return Ask(
        segment=segment,
        offset_bytes=offset_bytes,
        dtype=DType.FLOAT32,
        first_computed=positions[0],
        positions=np.array(positions, dtype=np.int32),
    )


class OneMatrix(Segments):
    """Segment 1 is memory of ours; there is no other."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self._memory = mmap.mmap(-1, rows * columns * 4)
        self.rows_RD = torch.frombuffer(self._memory, dtype=torch.float32).view(rows, columns).fill_(torch.nan)

    def mapping(self, number: int) -> mmap.mmap | None:
        return self._memory if number == 1 else None


@pytest.mark.parametrize(
    "message",
    [
        Hello(rank="tensor 0", writes=True, unhooked=["a.b"]),
        Adopt(number=3, size_bytes=2**40, holds_weights=False),
        Adopted(number=3),
        Drop(number=3),
    ],
)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert unpack(pack(message)) == message


@given(POSITIONS)
def test_an_ask_goes_through_request_parameters(positions: list[int]) -> None:
    sent = ask(positions, segment=7, offset_bytes=640)
    params = sent.to_params()
    assert all(isinstance(value, int | str) or set(map(type, value)) == {int} for value in params.values())
    got = Ask.from_params(params)
    assert got is not None
    assert got.positions.tolist() == positions
    assert (got.segment, got.offset_bytes, got.dtype, got.first_computed) == (7, 640, DType.FLOAT32, positions[0])


def test_layers_go_through_request_parameters_and_none_leaves_them_as_they_were() -> None:
    plain = ask([3, 9])
    assert "kdmesh_layers" not in plain.to_params()
    layered = replace(plain, layers=(2, 5))
    got = Ask.from_params(layered.to_params())
    assert got is not None
    assert got.layers == (2, 5)
    assert list(layers_asked(layered.to_params())) == [2, 5]
    assert not layers_asked(plain.to_params()) and not layers_asked(None) and not layers_asked({"thinking_budget": 3})


def test_a_contiguous_response_is_asked_for_in_two_numbers() -> None:
    assert ask(list(range(100, 4000))).to_params()["kdmesh_runs"] == [100, 4000]


@pytest.mark.parametrize("params", [None, {}, {"thinking_budget": 3}])
def test_other_peoples_requests_are_not_ours(params: dict[str, int] | None) -> None:
    assert Ask.from_params(params) is None


@given(POSITIONS, st.lists(st.integers(1, 62), max_size=6), st.data())
def test_wanted_rows_arrive_in_order_however_the_prompt_is_cut(
    positions: list[int], cuts: list[int], data: st.DataObject
) -> None:
    hidden_TD = torch.arange(62.0)[:, None].expand(62, 3)
    cached = data.draw(st.integers(0, positions[0]))
    edges = [cached, *sorted({cut for cut in cuts if cached < cut < 62}), 62]
    segments = OneMatrix(len(positions), 3)
    progress = RowProgress(ask(positions), segments, position=cached)
    for begin, end in itertools.pairwise(edges):
        progress.take(hidden_TD[begin:end])
    assert segments.rows_RD[:, 0].tolist() == positions
    assert (progress.num_written, progress.position) == (len(positions), 62)


@given(POSITIONS, st.lists(st.integers(1, 61), max_size=6))
def test_outputs_of_layers_lie_behind_their_final_hidden_states_however_the_prompt_is_cut(
    positions: list[int], cuts: list[int]
) -> None:
    hidden_TD = torch.arange(62.0)[:, None].expand(62, 3)
    outputs = {layer: hidden_TD + 100 * layer for layer in (1, 4, 6)}  # others of the batch ask for 1
    segments = OneMatrix(len(positions), 9)
    progress = RowProgress(replace(ask(positions), layers=(4, 6)), segments, position=0)
    for begin, end in itertools.pairwise([0, *sorted(set(cuts)), 62]):
        progress.take(hidden_TD[begin:end], {layer: output[begin:end] for layer, output in outputs.items()})
    expected_R1 = torch.tensor(positions)[:, None]
    assert torch.equal(
        segments.rows_RD, torch.cat([expected_R1 + first for first in (0, 400, 600)], 1).repeat_interleave(3, 1)
    )
    assert (progress.num_written, progress.position) == (len(positions), 62)


def test_rows_with_a_layer_that_is_not_known_are_missed() -> None:
    segments = OneMatrix(2, 9)
    progress = RowProgress(replace(ask([3, 9]), layers=(1, 2)), segments, position=0)
    progress.take(torch.zeros(12, 3), {2: torch.zeros(12, 3)})
    assert (progress.num_written, progress.position) == (0, 12)
    assert segments.rows_RD.isnan().all()


def test_rows_that_were_taken_from_the_cache_are_missed() -> None:
    progress = RowProgress(ask([3, 9]), OneMatrix(2, 3), position=5)
    progress.take(torch.zeros(7, 3))
    assert (progress.num_written, progress.position) == (1, 12)


def test_rows_for_memory_that_is_not_mapped_are_missed() -> None:
    progress = RowProgress(ask([3, 9], segment=2), OneMatrix(2, 3), position=0)
    progress.take(torch.zeros(12, 3))
    assert progress.num_written == 0


def request(ids: list[int], first: int) -> Request:
    positions = np.arange(first, len(ids) - 1, dtype=np.int32)
    sequence = TokenSequence(token_ids=np.array(ids, dtype=np.int32), positions=positions)
    return sequence, ask(positions.tolist())


def test_samples_of_one_prompt_wait_for_the_first_of_them() -> None:
    prompt, other = list(range(40)), list(range(1, 41))
    requests = [
        request([*prompt, 1, 2], 40),
        request([*other, 1, 2], 40),
        request([*prompt, 3, 4, 5], 40),
        request([*prompt, 1, 2], 39),  # wants a row of the prompt itself
        request([*prompt, 6, 7], 40),
        request([1, 2, 3], 0),
        request([1, 2, 4], 0),
    ]
    alone, shared = waves(requests)
    assert sorted(alone) == [1, 3, 5, 6]
    assert shared == [(0, [2, 4])]


def engine(**members: object) -> SglangEngine:
    return SglangEngine.model_validate({"kind": "sglang", "model": "m"} | members)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"updatable": True, "data_parallel": 2}, "updatable needs data_parallel 1, not 2"),
        ({"updatable": True, "quantization": "fp8"}, "quantization is fp8"),
        ({"updatable": True, "on_death": "restart"}, "updatable needs on_death exit"),
        ({"arguments": {"tp_size": 2}}, "tp_size cannot be given; set engine.tensor_parallel instead"),
        ({"arguments": {"skip_tokenizer_init": False}}, "skip_tokenizer_init cannot be given; the server decides it"),
        ({"arguments": {"enable_return_aux_hidden_states": True}}, "jobs ask for those by objective.layers"),
        (
            {"arguments": {"speculative_algorithm": "EAGLE3"}},
            "speculative_algorithm cannot be given; a teacher decodes",
        ),
        ({"num_nodes": 2, "tensor_parallel": 2}, "dist_init_address must say where they meet"),
        ({"node_rank": 1}, "with 1 nodes the last is one less"),
        ({"tensor_parallel": 4, "expert_parallel": 3}, "expert_parallel 3 does not divide tensor_parallel 4"),
        ({"num_nodes": 2, "tensor_parallel": 3, "dist_init_address": "a:1"}, "a multiple of num_nodes 2"),
        ({"num_nodes": 2, "pipeline_parallel": 2, "dist_init_address": "a:1"}, "pipeline_parallel 2 needs num_nodes 1"),
        ({"sleep": True, "device": "cpu"}, "SGLang can only give a GPU's memory back"),
        ({"arguments": {"enable_memory_saver": True}}, "enable_memory_saver cannot be given; set engine.sleep instead"),
        (
            {"on_death": "restart", "num_nodes": 2, "tensor_parallel": 2, "dist_init_address": "a:1"},
            "on_death restart needs num_nodes 1, not 2",
        ),
        ({"tensor_paralel": 2}, "Extra inputs are not permitted"),
    ],
)
def test_an_impossible_engine_is_refused(members: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        engine(**members)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, ""),
        ({"tensor_parallel": 2, "data_parallel": 2, "arguments": {"moe_dp_size": 1, "enable_pdmux": False}}, ""),
        ({"pipeline_parallel": 2}, "engine.pipeline_parallel is 2"),
        ({"self_probe": False}, "engine.self_probe is false"),
        ({"arguments": {"enable_dp_attention": True}}, "engine.arguments has enable_dp_attention"),
        ({"arguments": {"attn_cp_size": 2}}, "engine.arguments has attn_cp_size"),
    ],
)
def test_layers_are_refused_where_no_process_has_all_of_them_or_nothing_compares_them(
    members: dict[str, object], reason: str
) -> None:
    said = engine(**members).layers_refusal
    assert (said == "") if reason == "" else said.startswith(reason)


def test_remote_code_is_off_and_the_caches_are_on() -> None:
    made = engine()
    assert not made.trust_remote_code
    assert made.prefix_cache
    assert made.self_probe


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0"])
def test_an_untested_version_is_refused(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / f"sglang-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"SGLang {version} is installed"):
        require_tested_version()


def test_the_plugin_loads_nothing_heavy_into_processes_that_are_not_ours() -> None:
    script = (
        "import sys; from kdmesh_teacher.sglang.plugin import register; register();"
        "print(*sorted({'torch', 'sglang', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
