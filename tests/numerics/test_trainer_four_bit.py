"""A base that rests in four bits: the numbers of the paper, and a student that is them with its adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh_trainer.memory.memory_plan import plan
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.four_bit import VALUES, FourBitLinear, pack, unpack
from kdmesh_trainer.student.lora import add_adapter
from kdmesh_trainer.student.weights import weights_of
from tests.numerics.test_memory_plan import TINY, job, saved
from tests.numerics.test_trainer_compiled import needs_compiler
from tests.numerics.test_trainer_lora import textbook
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_ranks import finish, run_ranks, start_ranks_of

LORA = "tests.numerics.test_trainer_lora"
# 64 divides the inputs of every matrix.
EVEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def nearest(matrix: Tensor) -> Tensor:
    """Every number as the nearest of the 16 that its 64 neighbours share, each in float64 and rounded once."""
    blocks = matrix.double().reshape(-1, 64)
    values = blocks.abs().amax(1, keepdim=True) * torch.tensor(VALUES, dtype=torch.float64)
    chosen = (blocks[:, :, None] - values[:, None, :]).abs().argmin(-1)
    return values.gather(1, chosen).bfloat16().reshape(matrix.shape)


def rounded(student: Path, directory: Path) -> Path:
    """The same student, in float32, with the linear matrices of its body rounded to four bits."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(nearest(parameter))
    shutil.copytree(student, directory)
    model.save_pretrained(directory)
    return directory


def test_the_sixteen_values_are_quantiles_of_a_normal_distribution() -> None:
    """As in the paper's own code: 8 at or above 0 and 7 below it, and 0, the ends at a probability of 0.9677083."""
    end = 0.9677083
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(torch.tensor(VALUES, dtype=torch.float64), expected / expected.max(), rtol=0, atol=1e-6)


def test_every_number_is_the_nearest_that_its_block_has() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 192) * torch.logspace(-30, 30, 5)[:, None]
    matrix[2, 64:128] = 0
    matrix[3, :64] = -2.5
    packed = pack(matrix)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, 192 // 64 * 36))
    assert torch.equal(unpack(packed), nearest(matrix))
    assert not unpack(packed)[2, 64:128].any()
    assert torch.equal(unpack(packed)[3, :64], matrix[3, :64].bfloat16())
    assert torch.equal(unpack(packed.bfloat16()), unpack(packed))  # as FSDP may gather them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_module_and_its_gradient_are_those_of_the_rounded_matrix(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 48, bias=has_bias)
    small = FourBitLinear(plain)
    with torch.no_grad():
        plain.weight.copy_(nearest(plain.weight))
    plain.to(dtype)  # and the bias, which is the same
    inputs = [torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    outputs = []
    for module, input_ in zip((plain, small), inputs, strict=True):
        outputs.append(module(input_.requires_grad_()))
        outputs[-1].square().sum().backward()
    assert torch.equal(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert small.weight.grad is None
    with pytest.raises(ConfigError, match=r"convert their inputs to torch\.uint8"):
        small(inputs[1].to(small.weight.dtype))


def compiled(mesh: Mesh) -> dict[str, Any]:
    """How far compiled modules are from themselves, and element types of what they keep that is as large as a matrix;
    in a process of its own, where what torch's compiler warns of is no error.
    """
    torch.manual_seed(0)
    modules = nn.Sequential(FourBitLinear(nn.Linear(64, 192)), nn.SiLU(), FourBitLinear(nn.Linear(192, 64)))
    input_ = torch.randn(5, 64, requires_grad=True)
    kept: list[Tensor] = []

    @torch.compiler.disable
    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = torch.compile(modules.forward, dynamic=True)(input_)
    found, expected = ((each, *torch.autograd.grad(each.sum(), input_)) for each in (output, modules(input_)))
    return {
        "apart": max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)),
        "kept": sorted({str(tensor.dtype) for tensor in kept if tensor.numel() > input_.shape[0] * 192}),
    }


@needs_compiler
@pytest.mark.slow
def test_compiled_modules_compute_with_the_same_numbers_and_keep_bytes_for_the_backward_pass() -> None:
    [outcome] = finish(start_ranks_of("tests.numerics.test_trainer_four_bit:compiled", ranks=1))
    assert outcome.exit_code == 0, outcome.errors
    told = json.loads(outcome.output.splitlines()[-1])
    assert told["kept"] == ["torch.uint8"]
    assert told["apart"] < 1e-5


@pytest.mark.parametrize(
    ("gather", "is_tied"), [("step", True), pytest.param("micro_batch", False, marks=pytest.mark.slow)]
)
def test_adapters_have_the_textbook_gradient_of_a_student_that_is_rounded(
    tiny_models: TinyModels, tmp_path: Path, gather: Gather, is_tied: bool
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied, **EVEN)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    alike = rounded(student, tmp_path / "rounded")
    for ranks in (1, 2):
        paths = {"student": str(student), "teacher": str(teacher), "output": str(tmp_path)}
        run_ranks(f"{LORA}:gradients", ranks=ranks, **paths, gather=gather, base="nf4")
        found = load_file(tmp_path / f"{ranks}.safetensors")
        expected = textbook(alike, teacher, {name: value for name, value in found.items() if name != "loss"})
        for name, value in expected.items():
            error = (found[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{ranks} ranks: {name} is off by {error}"


def test_matrices_of_the_body_rest_in_four_bits_and_nothing_else(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen3", seed=1, dtype=torch.bfloat16, **EVEN)
    lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in lm.state_dict().items()}
    adapter = add_adapter(lm, LoraConfig(rank=2, target_modules=("q_proj",), base="nf4"), seed=0)
    after = weights_of(lm, adapter)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        is_small = name.endswith("_proj.weight")
        assert weight.shape == before[name].shape
        assert torch.equal(weight.whole(torch.float32), (nearest(before[name]) if is_small else before[name]).float())
        assert weight.base.nbytes == before[name].numel() * (9 / 16 if is_small else 2)
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_dtype": "bfloat16", "checkpointed_every": 1},
        {"offloads": True},
        {"spreads_head": True},
        pytest.param({"is_compiled": True}, marks=needs_compiler),
    ],
)
@pytest.mark.timeout(800)
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    tiny_models: TinyModels, tmp_path: Path, options: dict[str, Any]
) -> None:
    arguments = {
        "student": str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True, **EVEN)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
        "lora": {"rank": 4, "base": "nf4"},
        **options,
    }
    check_exact_continuation(arguments, tmp_path / "other", within_s=350)


# peft asks transformers for a name that it will drop.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_model_is_the_rounded_base_with_the_adapter(
    tiny_models: TinyModels, tmp_path: Path, dtype: torch.dtype
) -> None:
    student = tiny_models.path("qwen3", seed=1, dtype=dtype, **EVEN)
    paths = {"student": str(student), "teacher": str(tiny_models.path("qwen3", seed=2)), "output": str(tmp_path)}
    run_ranks(f"{LORA}:train_and_export", ranks=2, **paths, base="nf4")
    base = AutoModelForCausalLM.from_pretrained(rounded(student, tmp_path / "rounded"), dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert written.dtype == dtype
    original = dict(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).named_parameters())
    for (name, parameter), expected in zip(written.named_parameters(), merged.parameters(), strict=True):
        exactly = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert torch.allclose(parameter.float(), expected, rtol=exactly, atol=1e-7), name
        assert torch.equal(parameter.float(), original[name]) == ("_proj" not in name), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_counts_four_bits_and_scales(tmp_path: Path, ranks: int) -> None:
    shape = {**TINY, "hidden_size": 512, "intermediate_size": 1024}
    alone = replace(job(saved(tmp_path, shape, is_tied=True), 300, [40, 24]), ranks=ranks)
    full, small = (
        plan(replace(alone, lora=LoraConfig(rank=2, base=base), frozen_dtype=torch.bfloat16))
        for base in ("full", "nf4")
    )
    numbers = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    saved_bytes = full.resident["parameters"] - small.resident["parameters"]
    assert saved_bytes == pytest.approx((2 - 9 / 16) * numbers / ranks, rel=1e-2)


def test_a_matrix_that_blocks_do_not_divide_is_refused_by_name(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path(seed=1), torch.float32, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^student\.lora\.base nf4 keeps 64 .* model\..*\.q_proj has 32 inputs"):
        add_adapter(lm, LoraConfig(base="nf4"), seed=0)
    assert all(parameter.requires_grad for parameter in lm.parameters())
