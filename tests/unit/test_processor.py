"""Who asks for a type that the processor is slow in is told so, with the key to change."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from kdmesh import processor
from kdmesh.processor import multiplies, warn_if_slow

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor with bfloat16, and one without."""
    has: bool = request.param
    mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: has, _is_mkldnn_fp16_supported=lambda: False)
    monkeypatch.setattr(processor.torch.ops, "mkldnn", mkldnn)
    return has


def test_a_type_is_fast_where_the_processor_has_it(has_bfloat16: bool) -> None:
    assert multiplies(torch.float32, CPU)
    assert multiplies(torch.bfloat16, CPU) is has_bfloat16
    assert not multiplies(torch.float16, CPU)
    assert multiplies(torch.bfloat16, torch.device("cuda"))


def test_the_warning_names_the_key(has_bfloat16: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_slow(torch.bfloat16, CPU, key="engine.dtype")
        warn_if_slow(torch.float32, CPU, key="engine.dtype")
    told = [] if has_bfloat16 else ["engine.dtype"]
    assert [record.__dict__["key"] for record in caplog.records] == told


def test_float32_is_told_to_be_slow_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.bfloat16):
            warn_if_slow(dtype, torch.device("cuda"), key="student.compute_dtype")
    assert [record.__dict__["dtype"] for record in caplog.records] == ["float32"]
    assert "bfloat16 is many times faster" in caplog.text
