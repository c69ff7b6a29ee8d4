"""Correctness, then figures, on one GPU: what `make gpu` runs, within 10 minutes. The last line is one JSON object.

Every part is a process of its own, so that one that fails, or breaks the CUDA context, costs nobody else. Needs torch,
triton, transformers, peft, grpcio, numpy and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import finish, say

_TESTS = Path(__file__).parents[2] / "tests/gpu"
_LIMIT_S = 570.0  # of everything
_END_S = 15.0  # that a part is given to end what it has started
# By what is worth most, should the time not suffice: its module's function, and the most seconds it may take.
_PARTS: Mapping[str, tuple[str, str, float]] = {
    "loss": ("benchmarks.gpu.loss", "measure", 120),
    "products": ("benchmarks.gpu.parts", "measure_products", 60),
    "others": ("benchmarks.gpu.loss", "measure_others", 150),
    "step": ("benchmarks.gpu.step", "measure", 120),
    "job": ("benchmarks.gpu.job", "measure", 240),
    "trace": ("benchmarks.gpu.trace", "measure", 90),
    "handles": ("benchmarks.gpu.handles", "measure", 60),
    "kernel": ("benchmarks.gpu.parts", "measure_kernel", 120),
    "precision": ("benchmarks.gpu.parts", "measure_precision", 60),
    "attention": ("benchmarks.gpu.parts", "measure_attention", 60),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What a child process came to."""

    ended_well: bool
    output: str


def main() -> None:
    """Print each part's figures and the JSON line; exits 1 when a part failed, 2 when there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: shows that it runs, measures nothing")
    parser.add_argument("--part", choices=_PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif why_not := _why_no_gpu():
        sys.stderr.write(f"not run: {why_not}\n")
        raise SystemExit(2)
    if given.part:
        _measure(given.part, is_dry=given.dry)
        return
    figures, is_good = _run_all(is_dry=given.dry)
    finish("gpu", figures)
    raise SystemExit(0 if is_good else 1)


def _why_no_gpu() -> str:
    """Nothing where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return ""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return f"torch {torch.__version__} sees no GPU on this machine (it was built for {build})"


def _run_all(*, is_dry: bool) -> tuple[dict[str, object], bool]:
    began_s = time.monotonic()
    figures: dict[str, object] = {"is_dry": is_dry, "machine": _machine()}
    say(json.dumps(figures["machine"]))
    suite = _child([sys.executable, "-m", "pytest", "-q", *_suite(), str(_TESTS)], limit_s=240)
    say(suite.output)
    figures["tests"] = {"passed": suite.ended_well, "summary": _last_line(suite.output)}
    is_good = suite.ended_well
    seconds: dict[str, int] = {}
    for name, (*_, longest_s) in _PARTS.items():
        left_s = _LIMIT_S - (time.monotonic() - began_s)
        if left_s < longest_s / 4:
            figures[name] = "left out: no time was left"
            is_good = False
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *(["--dry"] if is_dry else [])]
        done = _child(command, limit_s=min(longest_s, left_s))
        say(f"\n{name}\n{done.output}")
        found = _figures(done)
        figures[name] = {"failed": done.output[-1500:]} if found is None else found
        seconds[name] = round(time.monotonic() - began_s - _LIMIT_S + left_s)
        is_good &= found is not None
    figures["sanitizer"] = _sanitizer(_LIMIT_S - (time.monotonic() - began_s), is_dry=is_dry)
    figures["seconds"] = {**seconds, "all": round(time.monotonic() - began_s)}
    return figures, is_good


def _suite() -> list[str]:
    return ["-c", str(_TESTS / "pytest.ini"), f"--confcutdir={_TESTS}", "-rs"]


def _measure(name: str, *, is_dry: bool) -> None:
    from benchmarks.gpu.scale import choose

    module, function, _ = _PARTS[name]
    found = getattr(importlib.import_module(module), function)(choose(is_dry=is_dry))
    for key, value in found.items():
        say(f"{key}: {value}")
    say(json.dumps(found))


def _machine() -> dict[str, object]:
    import torch
    import transformers
    import triton

    has_gpu = torch.cuda.is_available()
    git = shutil.which("git")
    commit = "" if git is None else _child([git, "rev-parse", "--short", "HEAD"], limit_s=10).output.strip()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30) if has_gpu else None,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit if re.fullmatch("[0-9a-f]+", commit) else "unknown",
    }


def _sanitizer(left_s: float, *, is_dry: bool) -> str:
    """What compute-sanitizer says of the kernel's reductions in shared memory.

    It does not watch the memory of the device for races: for that there is the suite's comparison with a gradient
    that has memory of its own.
    """
    tool = shutil.which("compute-sanitizer")
    if is_dry or tool is None or left_s < 30:
        return "not run: " + ("dry" if is_dry else "no compute-sanitizer" if tool is None else "no time was left")
    test = "test_a_bfloat16_model_without_any_option_has_the_textbooks_values_and_rounded_gradients"
    tests = [f"{_TESTS / 'test_loss.py'}::{test}[{name}]" for name in ("jensen_shannon", "adaptive_kl")]
    done = _child(
        [tool, "--tool", "racecheck", sys.executable, "-m", "pytest", "-q", *_suite(), *tests], limit_s=left_s
    )
    if "RACECHECK SUMMARY" not in done.output:
        return f"no summary: {done.output[-500:]}"
    racing = re.findall(r"Race reported between \w+ access at (\w+)", done.output)
    # It takes the barriers of cuBLAS's own kernels for none.
    ours, others = (sum(name.startswith("nvjet") is is_theirs for name in racing) for is_theirs in (False, True))
    return f"{ours} races, and {others} in cuBLAS's kernels; the tests {'passed' if done.ended_well else 'failed'}"


def _child(command: list[str], *, limit_s: float) -> _Outcome:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return _Outcome(ended_well=False, output=f"{_end(process)}\nstopped after {limit_s:.0f} s")
    except BaseException:
        _end(process)
        raise
    return _Outcome(ended_well=process.returncode == 0, output=output.rstrip())


def _end(process: subprocess.Popen[str]) -> str:
    """What it has printed, once it is gone, and with it the servers that it started."""
    with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)  # so that it removes its files, and pytest tells how far it came
        process.communicate(timeout=_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0].rstrip()


def _figures(part: _Outcome) -> object:
    """Its JSON line, the last but for what libraries say while a process ends; None where there is none."""
    lines = [line for line in part.output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if part.ended_well and lines else None


def _last_line(output: str) -> str:
    return output.rpartition("\n")[2]


if __name__ == "__main__":
    main()
