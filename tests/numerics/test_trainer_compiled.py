"""Compiled layers say what the others say, are compiled once for every length, and go on exactly after a kill."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdmesh.errors import ConfigError
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student import compiled_layers
from kdmesh_trainer.student.weights import whole
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import finish, start_ranks_of
from tests.support.varlen import teach_cpus

pytestmark = pytest.mark.slow

HERE = "tests.numerics.test_trainer_compiled"
VOCABULARY_SIZE = 310
# rank -> micro-batches -> sequences: rows of every length, of one sequence and of several, and one of nothing.
PLAN = [[[0, 1, 2], [3], [8]], [[4, 5], [6, 7], []]]
LATER = [[[9, 10, 11, 12]], [[13]]]
# Largest |compiled - not| / |not| of a gradient in float32: fused kernels round elsewhere.
TOLERANCE = 1e-5
# In bfloat16, how much farther than the other from the gradient in float32: they round less often.
FARTHER = 1.1

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def gradients(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    output: str,
    dtype: str = "float32",
    gather: Gather = "micro_batch",
    every: int | None = None,
    lora: bool = False,
    together: bool = False,
) -> None:
    """Writes the gradient of a compiled and of another student, after one of other lengths; runs on every rank."""
    sequences = random_sequences(14, seed=5, vocabulary_size=VOCABULARY_SIZE)
    local_teacher = LocalTeacher(Path(teacher))
    if together:
        teach_cpus()
    for name in ("exact", "eager", "compiled"):
        model = build_student(
            Path(student),
            mesh,
            vocabulary_size=VOCABULARY_SIZE,
            compute_dtype=torch.float32 if name == "exact" else getattr(torch, dtype),
            lora=LoraConfig(rank=3, target_modules=("q_proj", "down_proj")) if lora else None,
            is_compiled=name == "compiled",
            checkpointed_every=every,
            gather=gather,
            is_varlen=together and name != "exact",
        )
        stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(learning_rate=1e-2), steps=2)
        with torch.no_grad():
            for key, parameter in model.lm.named_parameters():
                if "lora_B" in key:  # at 0, as it begins, the other half has no gradient
                    parameter.fill_(0.01)
        stepper.accumulate(step_batch(sequences, PLAN[mesh.rank], local_teacher))
        model.zero_grad(set_to_none=True)  # no update, which would make more of what rounding does
        with torch.compiler.set_stance("fail_on_recompile"):
            stepper.accumulate(step_batch(sequences, LATER[mesh.rank], local_teacher, step=1))
        results = {
            key: whole(parameter.grad, torch.float32)
            for key, parameter in model.lm.named_parameters()
            if parameter.requires_grad
        }
        if mesh.is_first:
            save_file(results, Path(output) / f"{name}.safetensors")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of two whole gradients."""
    return math.sqrt(sum((one[name] - gradient).square().sum().item() for name, gradient in other.items()))


@needs_compiler
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"dtype": "bfloat16", "gather": "step"}),
        ("qwen3", {"every": 1}),
        ("qwen3", {"every": 2, "lora": True}),
        ("gemma2", {"gather": "step"}),  # layers with and without a window
        ("llama", {"gather": "step"}),
        ("deepseek_v3", {"gather": "step"}),
        ("deepseek_v3", {"dtype": "bfloat16"}),  # with routers in float32
        ("qwen3_moe", {"every": 2}),
        ("gpt_oss", {"gather": "step"}),  # sinks
        ("qwen3", {"gather": "step", "together": True}),
        ("qwen3", {"every": 2, "together": True}),
    ],
)
@pytest.mark.timeout(400)
def test_a_compiled_student_has_the_same_gradient_at_lengths_that_it_was_not_compiled_for(
    tiny_models: TinyModels, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    paths = {
        "student": str(tiny_models.path(family, seed=1, num_hidden_layers=4)),
        "teacher": str(tiny_models.path("qwen3", seed=2, vocab_size=320)),
        "output": str(tmp_path),
    }
    outcomes = finish(start_ranks_of(f"{HERE}:gradients", ranks=2, **paths, **options), within_s=350)
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.errors
    exact, eager, compiled = (load_file(tmp_path / f"{name}.safetensors") for name in ("exact", "eager", "compiled"))
    assert exact.keys() == eager.keys() == compiled.keys()
    if "dtype" in options:
        assert distance(compiled, exact) < FARTHER * distance(eager, exact)
    else:
        for name, gradient in eager.items():
            assert (compiled[name] - gradient).norm() < TOLERANCE * gradient.norm(), name
    assert any(not torch.equal(compiled[name], gradient) for name, gradient in eager.items())  # so it was compiled


@needs_compiler
@pytest.mark.timeout(400)
@pytest.mark.parametrize("every", [None, 2])
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    tiny_models: TinyModels, tmp_path: Path, every: int | None
) -> None:
    arguments: dict[str, Any] = {
        **tiny_models.student_and_teacher(),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
        "is_compiled": True,
        "checkpointed_every": every,
    }
    check_exact_continuation(arguments, tmp_path / "other", within_s=350)


@pytest.mark.parametrize(("on_gpu", "variable"), [(False, "CXX"), (True, "CC")])
def test_a_compiler_that_is_not_there_is_named_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, variable: str
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(ConfigError, match=rf"there is no no-such-compiler on the PATH.*variable {variable}$"):
        compiled_layers.check_compiler(on_gpu=on_gpu)
