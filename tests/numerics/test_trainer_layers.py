"""Layers are compared as the textbook says, however a batch is spread and the student computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from kdmesh.errors import ConfigError
from kdmesh.types import TokenSequence
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.student.weights import whole
from tests.numerics.test_trainer_compiled import needs_compiler
from tests.numerics.test_trainer_layouts import LAYOUTS, NUM_SEQUENCES, VOCABULARY_SIZE, assert_equal
from tests.support.killed_runs import check_exact_continuation
from tests.support.tiny_models import TinyModels
from tests.support.trainer_on_policy import losses
from tests.support.trainer_parts import (
    LAYER_WEIGHT,
    Layers,
    LocalTeacher,
    build_stepper,
    build_student,
    random_sequences,
    step_batch,
)
from tests.support.trainer_ranks import run_ranks

HERE = "tests.numerics.test_trainer_layers"
RUNS = "tests.support.trainer_runs"
PAIRS = {1: 2, 2: 2, 3: 5}  # one of the teacher's is compared twice
STEPS = 6


def weighted_sequences() -> list[TokenSequence]:
    """Some that count more than others."""
    sequences = random_sequences(NUM_SEQUENCES, seed=5, vocabulary_size=VOCABULARY_SIZE)
    return [replace(sequence, weight=0.5 + n % 3) for n, sequence in enumerate(sequences)]


def gradients_of_layouts(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    output: str,
    gather: Gather,
    distance: Any,
    teacher_width: int,
    **others: Any,
) -> None:
    """Writes every layout's losses, distance and whole gradient to `output`; runs on every rank.

    Args:
        others: of build_student.
    """
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.float32,
        gather=gather,
        layers=Layers(pairs=PAIRS, distance=distance, teacher_width=teacher_width),
        **others,
    )
    local_teacher = LocalTeacher(Path(teacher), layers=set(PAIRS.values()))
    stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1)
    for number, plan in enumerate(LAYOUTS[mesh.num_data_groups].values()):
        context = ContextRows.of(mesh, [""])
        batch = step_batch(weighted_sequences(), plan[mesh.data_group], local_teacher, context=context)
        totals, _ = stepper.accumulate(batch).over_all_ranks()
        results = {name: whole(p.grad, None) for name, p in model.lm.named_parameters()}
        if model.algorithm is not None:
            results |= {name: whole(p.grad, None) for name, p in model.algorithm.named_parameters()}
        assert totals.layer_distance is not None and totals.num_layered == batch.num_loss_tokens
        loss = totals.loss * batch.loss_weight / batch.num_loss_tokens  # of weights relative to their mean
        results["loss"] = torch.tensor([loss, totals.divergence], dtype=torch.float64)
        results["distance"] = torch.tensor([totals.layer_distance], dtype=torch.float64)
        if mesh.is_first:
            save_file(results, Path(output) / f"{mesh.num_data_groups}-{number}.safetensors")


def textbook(student: Path, teacher: Path, *, distance: str, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, one sequence at a time, from what Hugging Face's own forward tells of its layers.

    Args:
        maps: from the student's width to the teacher's, by the names of parameters; none: the widths are equal.
    """
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    maps = {name: matrix.double().requires_grad_() for name, matrix in maps.items()}
    sequences = weighted_sequences()
    loss = divergence = total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()
        own, theirs = (lm(token_ids, output_hidden_states=True) for lm in (model, other))
        log_q_RV, log_p_RV = (
            told.logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach_()
            if told is theirs
            else told.logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1)
            for told in (own, theirs)
        )
        kl_R = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(-1)
        ce_R = -log_q_RV.gather(1, torch.from_numpy(sequence.labels).long()[:, None])[:, 0]
        apart = []
        for number, (layer, compared) in enumerate(PAIRS.items()):
            h_s, h_t = own.hidden_states[layer][0, positions], theirs.hidden_states[compared][0, positions].detach()
            h_s = h_s @ maps[f"maps.{number}.weight"].T if maps else h_s
            apart.append(1 - cosine_similarity(h_s, h_t) if distance == "cosine" else (h_s - h_t).square().mean(-1))
        apart_R = torch.stack(apart).mean(0)
        loss = loss + sequence.weight * (kl_R + 0.3 * ce_R + LAYER_WEIGHT * apart_R).sum()
        divergence, total = divergence + kl_R.sum(), total + apart_R.sum()
    (loss / sum(sequence.num_rows * sequence.weight for sequence in sequences)).backward()
    rows = sum(sequence.num_rows for sequence in sequences)
    return {
        "loss": torch.stack([loss, divergence]).detach(),
        "distance": total.detach()[None] / rows,
        **{name: p.grad for name, p in model.named_parameters()},
        **{name: matrix.grad for name, matrix in maps.items()},
    }


def maps_of(student_width: int, teacher_width: int) -> dict[str, Tensor]:
    layers = Layers(pairs=PAIRS, distance="mse", teacher_width=teacher_width)
    return {name: p.detach() for name, p in layers.distance_from(student_width).named_parameters()}


@pytest.mark.parametrize(
    ("family", "distance", "teacher_width", "ranks", "others"),
    [
        ("qwen3", "mse", 48, 1, {"gather": "micro_batch"}),
        ("qwen3", "mse", 48, 2, {"gather": "micro_batch", "checkpointed_every": 1}),
        ("qwen3", "cosine", 32, 2, {"gather": "step", "unit_parameters": 10**6}),
        ("gemma2", "cosine", 48, 2, {"gather": "step", "checkpointed_every": 2}),
        pytest.param("qwen3", "cosine", 48, 2, {"gather": "step", "spreads_head": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", "cosine", 48, 2, {"gather": "step"}, marks=pytest.mark.slow),
        pytest.param("qwen3", "mse", 48, 2, {"gather": "micro_batch", "offloads": True}, marks=pytest.mark.slow),
    ],
)
def test_every_layout_has_the_textbook_loss_and_gradient_also_of_the_maps(
    tiny_models: TinyModels,
    tmp_path: Path,
    family: str,
    distance: str,
    teacher_width: int,
    ranks: int,
    others: dict[str, Any],
) -> None:
    student, teacher = models(tiny_models, teacher_width, family)
    told = {"student": str(student), "teacher": str(teacher), "output": str(tmp_path), **others}
    run_ranks(f"{HERE}:gradients_of_layouts", ranks=ranks, **told, distance=distance, teacher_width=teacher_width)
    maps = {} if teacher_width == 32 else maps_of(32, teacher_width)
    assert_equal(textbook(student, teacher, distance=distance, maps=maps), tmp_path, ranks)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(400)
def test_compiled_layers_have_the_textbook_loss_and_gradient(tiny_models: TinyModels, tmp_path: Path) -> None:
    student, teacher = models(tiny_models, 48)
    run_ranks(
        f"{HERE}:gradients_of_layouts",
        ranks=2,
        within_s=350,
        student=str(student),
        teacher=str(teacher),
        output=str(tmp_path),
        gather="micro_batch",
        distance="mse",
        teacher_width=48,
        is_compiled=True,
        checkpointed_every=1,
    )
    assert_equal(textbook(student, teacher, distance="mse", maps=maps_of(32, 48)), tmp_path, 2)


@pytest.mark.parametrize(
    ("ranks", "context", "distance", "teacher_width"),
    [
        (2, 2, "mse", 48),
        pytest.param(3, 3, "cosine", 32, marks=pytest.mark.slow),  # of 4 heads, so that they exchange keys
        pytest.param(4, 2, "cosine", 48, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hold_each_row_together_have_the_textbook_loss_and_gradient(
    tiny_models: TinyModels, tmp_path: Path, ranks: int, context: int, distance: str, teacher_width: int
) -> None:
    student, teacher = models(tiny_models, teacher_width)
    told = {"student": str(student), "teacher": str(teacher), "output": str(tmp_path)}
    run_ranks(
        f"{HERE}:gradients_of_layouts",
        ranks=ranks,
        context=context,
        **told,
        gather="micro_batch",
        distance=distance,
        teacher_width=teacher_width,
    )
    maps = {} if teacher_width == 32 else maps_of(32, teacher_width)
    assert_equal(textbook(student, teacher, distance=distance, maps=maps), tmp_path, ranks // context)


def models(tiny_models: TinyModels, teacher_width: int, family: str = "qwen3") -> tuple[Path, Path]:
    """Four layers of a student, and six of a teacher with as many of its own."""
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2} if family == "qwen3_5_text" else {}
    return (
        tiny_models.path(family, seed=1, num_hidden_layers=4, **kinds),
        tiny_models.path("llama", seed=2, num_hidden_layers=6, hidden_size=teacher_width, vocab_size=336),
    )


def test_adapters_below_a_layer_learn_from_it_and_those_above_do_not(mesh: Mesh, tiny_models: TinyModels) -> None:
    student, teacher = models(tiny_models, 32)
    model = build_student(
        student,
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.bfloat16,
        lora=LoraConfig(rank=2),
        layers=Layers(pairs={2: 3}, distance="mse", teacher_width=32),
    )
    local_teacher = LocalTeacher(teacher, layers=[3])
    stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1, kd_weight=0, ce_weight=0)
    stepper.accumulate(step_batch(weighted_sequences(), [range(NUM_SEQUENCES)], local_teacher))
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:  # A has no gradient while B is 0
            layer = int(name.split("layers.")[1].split(".")[0])
            assert parameter.grad is not None
            assert bool(parameter.grad.abs().max() > 0) is (layer < 2), name


def test_a_layer_that_the_student_lacks_is_refused(mesh: Mesh, tiny_models: TinyModels) -> None:
    with pytest.raises(ConfigError, match="has no decoder layer 5; it has 4 that are numbered"):
        build_student(
            models(tiny_models, 32)[0],
            mesh,
            vocabulary_size=VOCABULARY_SIZE,
            compute_dtype=torch.float32,
            layers=Layers(pairs={1: 1, 5: 2}, distance="mse", teacher_width=32),
        )


# Runs


@pytest.fixture
def arguments(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    student, teacher = models(tiny_models, 48)
    return {
        "student": str(student),
        "teacher": str(teacher),
        "checkpoints": str(tmp_path / "checkpoints"),
        "steps": STEPS,
        "layers": {"pairs": {"1": 2, "3": 5}, "distance": "mse", "teacher_width": 48},
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_dual_space", [False, True])
def test_two_ranks_train_the_maps_that_one_does_also_where_one_has_nothing_to_do(
    arguments: dict[str, Any], is_dual_space: bool
) -> None:
    arguments |= {"until": STEPS, "num_sequences": [3, 1], "is_dual_space": is_dual_space}
    first, second = run_ranks(f"{RUNS}:train", ranks=2, **arguments)
    (alone,) = run_ranks(f"{RUNS}:train", ranks=1, **arguments)
    (untrained,) = run_ranks(f"{RUNS}:train", ranks=1, **arguments | {"until": 0})
    assert first["blanks"] + second["blanks"] > 0
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["distances"] == second["distances"] == pytest.approx(alone["distances"], rel=1e-5)
    assert len(alone["parameters"]) == (3 if is_dual_space else 2)
    for name, values in alone["parameters"].items():
        assert first["parameters"][name] == second["parameters"][name] == pytest.approx(values, rel=1e-3, abs=1e-5)
        assert values != pytest.approx(untrained["parameters"][name], abs=1e-3)


@pytest.mark.slow
def test_losses_after_sigkill_are_exactly_those_of_the_uninterrupted_run(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    check_exact_continuation(arguments | {"until": STEPS}, tmp_path / "other")


@pytest.mark.slow
def test_layers_of_the_students_own_samples_are_compared_on_any_number_of_ranks(
    mesh: Mesh, arguments: dict[str, Any]
) -> None:
    told = {key: arguments[key] for key in ("student", "teacher", "layers")} | {"steps": 2}
    alone = losses(mesh, **told)
    first, second = run_ranks("tests.support.trainer_on_policy:losses", ranks=2, **told)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["distances"] == second["distances"] == pytest.approx(alone["distances"], rel=1e-4)
    assert min(alone["distances"]) > 0


def test_a_held_out_figure_is_of_the_final_states_alone(mesh: Mesh, tiny_models: TinyModels) -> None:
    student, teacher = models(tiny_models, 48)
    found = []
    for layers in ((), (2, 5)):
        local_teacher = LocalTeacher(teacher, layers=layers)
        evaluator = HeldOutEvaluator(
            build_student(student, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32),
            weighted_sequences(),
            teacher=local_teacher,
            teacher_head=TeacherHead(local_teacher, vocabulary_size=VOCABULARY_SIZE, device=mesh.device),
            max_tokens=64,
            prefetch=1,
            mesh=mesh,
        )
        found.append(evaluator.evaluate())
    assert found[0] == found[1]
