"""The GPU's row kernel without a GPU: in Triton's interpreter, and compiled for one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.row_kernel import launch, resources
from kdmesh.losses.gpu.form import Op

GPU_TESTS = Path(__file__).parents[1] / "gpu"


def test_in_tritons_interpreter_the_gpus_tests_of_the_loss_pass() -> None:
    # A process of its own: Triton decides when it is imported whether it compiles or interprets.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-c", GPU_TESTS / "pytest.ini", f"--confcutdir={GPU_TESTS}"),
            *(GPU_TESTS / "test_loss.py", GPU_TESTS / "test_in_place.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b6\d passed, 5 skipped", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("op", "is_full"), [(Op.NOTHING, False), (Op.FORWARD_KL, False), (Op.REVERSE_KL, True), (Op.ALPHA_BETA, True)]
)
def test_compiled_for_sm_90_it_needs_few_registers_and_reads_whole_vectors(op: Op, is_full: bool) -> None:
    found = resources(launch(op, is_full=is_full))
    assert found.registers <= 128  # two programs of 256 threads at a time
    assert found.spilled_bytes <= 32
    assert found.wide_loads >= (8 if op is Op.NOTHING else 16)
