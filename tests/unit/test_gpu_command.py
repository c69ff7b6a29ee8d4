"""What `make gpu` does where there is no GPU."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

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


def test_only_jobs_and_families_need_what_the_services_need() -> None:
    modules = {module for module, *_ in command._PARTS.values()}
    modules |= {f"tests.gpu.{path.stem}" for path in command._TESTS.glob("test_*.py")} - {"tests.gpu.test_families"}
    done = without_what_services_need(f"import {', '.join(sorted(modules))}")
    assert done.returncode == 0, done.stderr
    done = without_what_services_need("import tests.gpu.test_families")
    assert "Skipped: could not import" in done.stderr


def without_what_services_need(script: str) -> subprocess.CompletedProcess[str]:
    """What comes of Python code where none of those packages is."""
    hidden = (*job._NEEDED, "pyarrow", "tensorboard")
    script = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); {script}"
    return subprocess.run([sys.executable, "-c", script], cwd=command._TESTS.parents[1], capture_output=True, text=True)


def test_a_part_that_takes_too_long_is_ended_with_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_END_S", 1.0)
    stubborn = ["sh", "-c", "trap '' INT; sleep 600; sleep 600"]
    script = f"import subprocess as s; print(s.Popen({stubborn}).pid, flush=True); s.run(['sleep', '600'])"
    done = command._child([sys.executable, "-c", script], limit_s=3)
    assert not done.ended_well
    assert done.output.endswith("stopped after 3 s")
    started = Path(f"/proc/{done.output.split()[0]}/cmdline")
    assert not started.exists() or not started.read_bytes()  # one that nobody has waited for yet has no command line


def test_what_a_library_says_at_the_end_hides_no_figures() -> None:
    said = '{"ms": 1}\n{"ms": 2}\n[W1126] destroyed late'
    assert command._figures(command._Outcome(ended_well=True, output=said)) == {"ms": 2}
    assert command._figures(command._Outcome(ended_well=True, output="nothing")) is None
    assert command._figures(command._Outcome(ended_well=False, output=said)) is None


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
