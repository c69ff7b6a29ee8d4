"""What `make gpu` does where there is no GPU."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import job


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith("not run: torch ")
    assert "sees no GPU on this machine" in told.err
    assert told.out == ""


def test_every_part_is_a_function_of_the_scale() -> None:
    for module, function, _ in command._PARTS.values():
        measure = getattr(importlib.import_module(module), function)
        assert list(inspect.signature(measure).parameters) == ["scale"]


def test_only_a_job_needs_what_the_services_need() -> None:
    modules = {module for module, *_ in command._PARTS.values()}
    modules |= {f"tests.gpu.{path.stem}" for path in command._TESTS.glob("test_*.py")}
    hidden = (*job._NEEDED, "pyarrow", "tensorboard")
    script = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import {', '.join(sorted(modules))}"
    done = subprocess.run([sys.executable, "-c", script], cwd=command._TESTS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_runs_at_a_tiny_size_on_a_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry"], stdout=subprocess.PIPE, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout
    figures = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    assert figures["is_dry"] and figures["tests"]["passed"]
    for part in command._PARTS:
        assert isinstance(figures[part], dict) and "failed" not in figures[part], part
