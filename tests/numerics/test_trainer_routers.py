"""What transformers keeps in float32, as routers, is computed from float32 weights in a student of bfloat16 too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kdmesh.losses import FusedLoss
from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.packing import pack
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.student.model import begin_micro_batch
from kdmesh_trainer.student.weights import whole
from tests.support.relative_error import relative_error
from tests.support.tiny_models import FAMILIES, MIXTURES, TinyModels
from tests.support.trainer_parts import build_student, random_sequences
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_routers"
VOCABULARY_SIZE = 310
CPU = torch.device("cpu")

# Of whose modules transformers keeps some parameters in float32 and others not.
_PARTLY: dict[str, dict[str, Any]] = {
    "afmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "flint": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [],
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "olmo_hybrid": {
        **FAMILIES["olmo_hybrid"],
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}


def packed() -> Any:
    return pack(random_sequences(5, seed=7, vocabulary_size=VOCABULARY_SIZE))


def squares(hidden_RD: Tensor, *_: Any) -> FusedLoss:
    """A loss of the hidden states alone."""
    no_rows = hidden_RD.new_zeros(0)
    return FusedLoss.of((hidden_RD.float() - 1).square().sum(), [no_rows] * 6)


def routers(lm: nn.Module) -> dict[str, nn.Module]:
    """By layer; those that have a weight of their own."""
    return {
        name: module for name, module in lm.named_modules() if name.endswith("mlp.gate") and hasattr(module, "weight")
    }


@contextmanager
def listening(lm: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What each router reads, and its logits, in the forward pass inside."""
    heard: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            heard[f"{name}.input"] = inputs[0].detach().clone()
            heard[f"{name}.logits"] = output[0].detach().clone()

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in routers(lm).items()]
    yield heard
    for each in hooks:
        each.remove()


def of_student(mesh: Mesh, *, student: str, output: str, **options: Any) -> None:
    """Writes what the routers of a student read and say, its hidden states and its gradient; runs on every rank."""
    told = {"gather": "auto" if mesh.world_size == 1 else "micro_batch"} | options
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.bfloat16, **told)
    model.train()
    results: dict[str, Tensor] = {}

    def loss(hidden_RD: Tensor, *_: Any) -> FusedLoss:
        results["hidden"] = hidden_RD.detach().clone()
        return squares(hidden_RD)

    begin_micro_batch(model, is_last=True)
    with listening(model.lm) as heard:
        totals = model(packed(), loss)
    totals.loss_sum.backward()
    gradients = {
        f"gradient.{name}": whole(parameter.grad, None)
        for name, parameter in model.lm.named_parameters()
        if parameter.grad is not None
    }
    if mesh.is_first:
        save_file({**results, **heard, **gradients}, output)


def of_transformers(path: Path) -> dict[str, Tensor]:
    """The same of a model in bfloat16 that nobody shards."""
    lm = load_causal_lm(path, torch.bfloat16, CPU).train()
    row = packed()
    hidden_RD = hidden_states_TD(lm, row).index_select(0, row.rows_R)
    squares(hidden_RD).loss_sum.backward()  # type: ignore[no-untyped-call]
    gradients = {f"gradient.{name}": p.grad for name, p in lm.named_parameters() if p.grad is not None}
    return {"hidden": hidden_RD.detach(), **gradients}


@pytest.mark.parametrize("family", list(MIXTURES))
def test_servers_hold_every_tensor_in_transformers_type(tiny_models: TinyModels, family: str) -> None:
    path = tiny_models.path(family, seed=1)
    loaded, own = (
        load_causal_lm(path, torch.bfloat16, CPU),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
    )
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in own.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "ranks", "options"),
    [
        ("glm4_moe", 1, {}),
        ("deepseek_v3", 2, {}),
        ("deepseek_v2", 2, {"gather": "step"}),
        ("glm4_moe", 2, {"checkpointed_every": 1, "unit_parameters": 10**6}),
        ("glm4_moe", 2, {"frozen": ["model.layers.1.mlp.gate"]}),
        pytest.param("glm4_moe", 1, {"gather": "micro_batch", "offloads": True}, marks=pytest.mark.slow),
        ("qwen3_moe", 2, {}),  # whose routers transformers rounds with the rest
    ],
)
def test_a_student_in_bfloat16_computes_what_transformers_does(
    tiny_models: TinyModels, tmp_path: Path, family: str, ranks: int, options: dict[str, Any]
) -> None:
    path, output = tiny_models.path(family, seed=1, num_hidden_layers=3), tmp_path / "found"
    run_ranks(f"{HERE}:of_student", ranks=ranks, student=str(path), output=str(output), **options)
    found, expected = load_file(output), of_transformers(path)
    for name, router in routers(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)).items():
        read = found[f"{name}.input"]
        logits = router(read)[0]
        assert torch.equal(found[f"{name}.logits"], logits)
        rounded = nn.functional.linear(read, router.get_parameter("weight").detach().bfloat16())
        assert torch.equal(logits, rounded) is (family == "qwen3_moe")
    assert torch.equal(found["hidden"], expected["hidden"])
    trained = [name for name in found if name.startswith("gradient.")]
    assert len(trained) > 10
    for name in trained:
        assert found[name].dtype is torch.float32
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 4e-3, name


@pytest.mark.parametrize(
    ("family", "ranks", "options"),
    [
        ("afmoe", 1, {}),
        ("afmoe", 2, {"gather": "step"}),
        ("afmoe", 2, {"checkpointed_every": 1, "unit_parameters": 10**6}),
        ("flint", 2, {}),
        ("olmo_hybrid", 1, {}),
        ("olmo_hybrid", 2, {"gather": "step", "offloads": True}),
        pytest.param("olmo_hybrid", 2, {"unit_parameters": 10**6}, marks=pytest.mark.slow),
    ],
)
def test_so_are_single_parameters_that_transformers_keeps_in_float32(
    tiny_models: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    ranks: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setitem(FAMILIES, family, _PARTLY[family])
    path, output = tmp_path / "model", tmp_path / "found"
    copytree(tiny_models.path(family, seed=1, num_hidden_layers=3), path)
    weights = load_file(path / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("expert_bias"):
            tensor += 64  # between two bfloat16 numbers there, all experts are the same
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    run_ranks(f"{HERE}:of_student", ranks=ranks, student=str(path), output=str(output), **options)
    found, expected = load_file(output), of_transformers(path)
    assert torch.equal(found["hidden"], expected["hidden"])
    assert len(expected) > 10
    for name in expected:
        assert relative_error(found[name], expected[name]) < 4e-3, name
