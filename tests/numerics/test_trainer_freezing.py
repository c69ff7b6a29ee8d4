"""Parameters that are frozen by name stay as they are, and the others learn what they learn without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.freezing import check_freeze, freeze, rest_in_bfloat16
from kdmesh_trainer.student.model import release
from kdmesh_trainer.student.weights import whole
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_freezing"
RUNS = "tests.support.trainer_runs"
VOCABULARY_SIZE = 310
SEQUENCES = random_sequences(6, seed=5, vocabulary_size=VOCABULARY_SIZE)
# rank -> micro-batches -> sequences; of uneven sizes, one of them a blank.
PLANS = {1: [[[0, 5], [1, 2, 3, 4]]], 2: [[[0], [1, 2]], [[3, 4, 5], []]]}
RATE = OptimizerConfig(learning_rate=1e-2)
BEGINNING = ("model.embed_tokens", "model.layers.0")
MIDDLE = ("model.layers.1.mlp", "model.norm", "*.layers.*.self_attn.[kv]_proj")
HEAD = ("lm_head", "model.layers.1")


def learnt(
    mesh: Mesh, *, student: str, teacher: str, output: str, frozen: Sequence[str], gather: Gather, spreads_head: bool
) -> list[str]:
    """The names of what has a gradient, which is written to `output`, as is every weight after an update."""
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.float32,
        frozen=frozen,
        gather=gather,
        spreads_head=spreads_head,
    )
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=RATE, steps=2)
    batch = step_batch(SEQUENCES, PLANS[mesh.world_size][mesh.rank], local_teacher)
    stepper.accumulate(batch)
    gradients = {
        f"gradient.{name}": whole(p.grad, None) for name, p in model.lm.named_parameters() if p.grad is not None
    }
    stepper.update(batch)
    stepper.update(step_batch(SEQUENCES, PLANS[mesh.world_size][mesh.rank], local_teacher, step=1))
    assert len(stepper.optimizer.state) == len(gradients)
    release(model)
    weights = {f"weight.{name}": whole(p, None).clone() for name, p in model.lm.named_parameters()}
    if mesh.is_first:
        save_file(gradients | weights, Path(output))
    return [name.removeprefix("gradient.") for name in gradients]


@pytest.mark.parametrize(
    ("frozen", "is_tied", "dtype", "gather", "spreads_head"),
    [
        (BEGINNING, False, torch.bfloat16, "micro_batch", False),
        (MIDDLE, True, torch.float32, "step", False),
        (HEAD, False, torch.bfloat16, "micro_batch", True),
        pytest.param(HEAD, True, torch.bfloat16, "step", True, marks=pytest.mark.slow),
        pytest.param(BEGINNING, True, torch.float32, "micro_batch", False, marks=pytest.mark.slow),
        pytest.param(("model",), False, torch.bfloat16, "step", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_left_has_the_gradient_that_it_has_when_nothing_is_frozen(
    tiny_models: TinyModels,
    tmp_path: Path,
    frozen: Sequence[str],
    is_tied: bool,
    dtype: torch.dtype,
    gather: Gather,
    spreads_head: bool,
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied, dtype=dtype)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    paths: dict[str, Any] = {"student": str(student), "teacher": str(teacher)}
    arguments = {**paths, "output": str(tmp_path / "all"), "frozen": (), "gather": gather, "spreads_head": False}
    run_ranks(f"{HERE}:learnt", ranks=1, **arguments)
    expected, before = load_file(tmp_path / "all"), AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    freeze(before, frozen)
    trained = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    assert 0 < len(trained) < len(list(before.parameters()))
    for ranks in PLANS:
        arguments |= {
            "output": str(tmp_path / str(ranks)),
            "frozen": frozen,
            "spreads_head": spreads_head and ranks > 1,
        }
        assert set(run_ranks(f"{HERE}:learnt", ranks=ranks, **arguments)[0]) == trained
        found = load_file(tmp_path / str(ranks))
        for name, parameter in before.named_parameters():
            weight = found[f"weight.{name}"]
            assert torch.equal(weight.float(), parameter) is (name not in trained), name
            assert weight.dtype is (torch.float32 if name in trained else dtype)
            if name in trained:
                wanted = expected[f"gradient.{name}"]
                error = (found[f"gradient.{name}"] - wanted).norm() / wanted.norm()
                assert error < 1e-5, f"{ranks} ranks: {name} is off by {error}"


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": str(tiny_models.path("qwen3", seed=1, tie_word_embeddings=True, dtype=torch.bfloat16)),
        "teacher": str(tiny_models.path("qwen3", seed=2)),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": 6,
        "until": 6,
        "frozen": BEGINNING,
        "compute_dtype": "bfloat16",
    }


@pytest.mark.slow
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    check_exact_continuation(arguments, tmp_path / "other")


def test_a_run_continues_on_another_number_of_ranks_from_what_is_trained_alone(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments |= {"compute_dtype": "float32"}
    complete = run_ranks(f"{RUNS}:train", ranks=2, **arguments, save_at=3)[0]
    rest = run_ranks(f"{RUNS}:train", ranks=1, **arguments)[0]
    assert rest["first"] == 3
    assert rest["losses"] == pytest.approx(complete["losses"][3:], rel=1e-5)
    saved = FileSystemReader(tmp_path / "checkpoints" / "step-00000003").read_metadata().state_dict_metadata
    kept = {name.removeprefix("model.lm.model.") for name in saved if name.startswith("model.")}
    assert {name.rpartition(".layers.")[0] or name.split(".")[0] for name in kept} == {"layers", "norm"}
    assert not any("embed_tokens" in name or ".layers.0." in name for name in saved)


def test_a_name_stands_for_itself_and_for_what_is_in_it(tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models.path(seed=1, num_hidden_layers=12), torch.float32, torch.device("cpu"))
    freeze(lm, ["model.layers.1", "*.norm", "model.layers.*.mlp.up_proj.weight"])
    frozen = {name for name, parameter in lm.named_parameters() if not parameter.requires_grad}
    others = {f"model.layers.{n}.mlp.up_proj.weight" for n in range(12)} | {"model.norm.weight"}
    assert {name for name in frozen if not name.startswith("model.layers.1.")} == others - {
        "model.layers.1.mlp.up_proj.weight"
    }
    assert all(not p.requires_grad for p in lm.model.layers[1].parameters())


def test_a_tied_head_is_frozen_by_either_name(tiny_models: TinyModels) -> None:
    for name in ("lm_head", "model.embed_tokens"):
        lm = load_causal_lm(
            tiny_models.path("qwen3", seed=1, tie_word_embeddings=True), torch.float32, torch.device("cpu")
        )
        freeze(lm, [name])
        assert [n for n, p in lm.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.layers.7"], "model.layers.7 names no parameter; model.layers has 0, 1$"),
        (["layers.0"], "layers.0 names no parameter; the model has model, lm_head$"),
        (["model.norm.weight.x"], "model.norm.weight.x names no parameter; model.norm has weight$"),
        (
            ["lm_head", "model.layers.*.attn"],
            r"model.layers.\*.attn names no parameter; model.layers.\* has self_attn, ",
        ),
        (["model", "lm_head"], r"\[model, lm_head\] leaves no parameter to train$"),
        (["*"], r"\[\*\] leaves no parameter to train$"),
    ],
)
def test_what_names_nothing_or_everything_is_refused_without_loading_weights(
    tiny_models: TinyModels, patterns: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"^student.freeze: {words}"):
        check_freeze(patterns, tiny_models.path(seed=1))


def test_frozen_parameters_rest_in_bfloat16_where_that_is_exact(tiny_models: TinyModels) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        lm = load_causal_lm(tiny_models.path(seed=1, dtype=dtype), torch.float32, torch.device("cpu"))
        freeze(lm, ["model.layers.*.mlp"])
        rest_in_bfloat16(lm)
        assert {p.dtype for name, p in lm.named_parameters() if ".mlp." in name} == {dtype}
        assert {p.dtype for name, p in lm.named_parameters() if ".mlp." not in name} == {torch.float32}
