"""A step with several teachers has the textbook's loss and gradient, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.losses import OutputHead, forward_kl
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.seam import StudentRows, Terms
from kdmesh_trainer.data.encoding.sides import addressed
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.objectives.head import Heads, TeacherHead
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.objectives.panel_heads import PanelHeads
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.sources.panel import Panel
from kdmesh_trainer.sources.row_queue import RowService
from kdmesh_trainer.step import GradientStepper
from kdmesh_trainer.student.weights import whole
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

pytestmark = pytest.mark.slow

# Real tokens; the models' heads are padded to different sizes above it.
VOCABULARY_SIZE = 310
WEIGHTS = {"code": 3.0, "maths": 1.0}
TEMPERATURE = 1.5
# Of each sequence. One rank's micro-batches hold samples of both teachers, of one, or of none.
NAMES = ("code", "maths", "code", "code", "maths", "maths", "code", "maths")
LAYOUTS: dict[int, list[list[list[list[int]]]]] = {
    1: [[[[0, 1, 2, 3, 4, 5, 6, 7]]], [[[7, 1], [0, 5, 3], [4, 6], [2]]]],
    2: [[[[0, 1, 2]], [[3, 4, 5, 6, 7]]], [[[0], [1, 2], []], [[3, 6], [], [4, 5, 7]]]],
}


def batch_sequences() -> list[TokenSequence]:
    sequences = random_sequences(len(NAMES), seed=5, vocabulary_size=VOCABULARY_SIZE)
    return [addressed(sequence, name) for sequence, name in zip(sequences, NAMES, strict=True)]


def gradients_of_layouts(mesh: Mesh, *, student: str, teachers: dict[str, str], is_mixed: bool, output: str) -> None:
    """Writes every layout's figures and whole gradient to `output`; runs on every rank."""
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    local = {name: LocalTeacher(Path(path)) for name, path in teachers.items()}
    panel = Panel(local, asks_all=is_mixed)
    heads = PanelHeads(
        {name: TeacherHead(one, vocabulary_size=VOCABULARY_SIZE, device=mesh.device) for name, one in local.items()},
        weights=WEIGHTS if is_mixed else None,
    )
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=TEMPERATURE, kd_weight=1.0, ce_weight=0.3), teacher_head=heads
    )
    config = OptimizerConfig()
    stepper = GradientStepper(
        model, objective, build_adamw(model, config), config=config, steps=1, mesh=mesh, teachers=heads.names
    )
    for number, plan in enumerate(LAYOUTS[mesh.num_data_groups]):
        context = ContextRows.of(mesh, heads.names)
        tally = stepper.accumulate(step_batch(batch_sequences(), plan[mesh.data_group], panel, context=context))
        totals, _ = tally.over_all_ranks()
        results = {name: whole(p.grad, None) for name, p in model.lm.named_parameters()}
        results["loss"] = torch.tensor([totals.loss, totals.divergence, totals.cross_entropy], dtype=torch.float64)
        counts = [[one.tokens, one.loss_tokens] for one in totals.teachers.values()]
        results["counts"] = torch.tensor(counts, dtype=torch.float64)
        evaluator = HeldOutEvaluator(
            model, batch_sequences(), teacher=panel, teacher_head=heads, max_tokens=64, prefetch=2, mesh=mesh
        )
        results["kl"] = torch.tensor(evaluator.evaluate().kl_nats_per_token)
        if mesh.is_first:
            save_file(results, Path(output) / f"{mesh.num_data_groups}-{number}.safetensors")


def target(t: dict[str, Tensor], temperature: float, own: str | None) -> Tensor:
    """[R, V] the distribution of one teacher, or the mixture of both."""
    p = {name: (t_RV / temperature).softmax(-1) for name, t_RV in t.items()}
    return 0.75 * p["code"] + 0.25 * p["maths"] if own is None else p[own]


def textbook(student: str, teachers: dict[str, str], *, is_mixed: bool) -> dict[str, Tensor]:
    """The same in float64: whole logits of Hugging Face's own forward, one sequence after the other."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    others = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for name, path in teachers.items()}
    divergence = cross_entropy = kl = torch.zeros((), dtype=torch.float64)
    for sequence, own in zip(batch_sequences(), NAMES, strict=True):
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()

        t = {name: other(token_ids).logits[0, positions, :VOCABULARY_SIZE].detach() for name, other in others.items()}
        z_RV = model(token_ids).logits[0, positions, :VOCABULARY_SIZE]
        p_RV, p1_RV = (target(t, tau, None if is_mixed else own) for tau in (TEMPERATURE, 1.0))
        divergence = divergence + (p_RV * (p_RV.log() - (z_RV / TEMPERATURE).log_softmax(-1))).sum()
        kl = kl + (p1_RV * (p1_RV.log() - z_RV.log_softmax(-1))).sum()
        labels = torch.from_numpy(sequence.labels).long()
        cross_entropy = cross_entropy - z_RV.log_softmax(-1).gather(1, labels[:, None]).sum()
    loss = divergence + 0.3 * cross_entropy
    num_rows = sum(sequence.num_rows for sequence in batch_sequences())
    (loss / num_rows).backward()
    counts = [
        [
            sum(count for count, name in zip(counted, NAMES, strict=True) if is_mixed or name == teacher)
            for counted in zip(*((s.num_tokens, s.num_rows) for s in batch_sequences()), strict=True)
        ]
        for teacher in teachers
    ]
    return {
        "loss": torch.stack([loss, divergence, cross_entropy]).detach(),
        "kl": (kl / num_rows).detach(),
        "counts": torch.tensor(counts, dtype=torch.float64),
        **{name: p.grad for name, p in model.named_parameters()},
    }


class Counted(LocalTeacher):
    """Counts how often its head is fetched."""

    num_fetched = 0

    def head(self) -> tuple[OutputHead, int]:
        self.num_fetched += 1
        return super().head()


def losses_and_weights(mesh: Mesh, student: Path, panel: RowService, heads: Heads) -> list[Tensor]:
    """Of two steps and an evaluation of a fresh student."""
    model = build_student(student, mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=TEMPERATURE, kd_weight=1.0, ce_weight=0.3), teacher_head=heads
    )
    config = OptimizerConfig(learning_rate=1e-2)
    stepper = GradientStepper(
        model, objective, build_adamw(model, config), config=config, steps=2, mesh=mesh, teachers=heads.names
    )
    figures = [
        stepper.update(step_batch(batch_sequences(), [[0, 5], [1, 2, 3, 4, 6, 7]], panel, step=step))
        for step in range(2)
    ]
    evaluator = HeldOutEvaluator(
        model, batch_sequences(), teacher=panel, teacher_head=heads, max_tokens=64, prefetch=2, mesh=mesh
    )
    kl = evaluator.evaluate().kl_nats_per_token
    assert kl is not None
    numbers = [value for one in figures for value in (one.loss_nats_per_token, one.gradient_norm)]
    return [torch.tensor([*numbers, kl], dtype=torch.float64), *(whole(p, None) for p in model.parameters())]


def test_one_named_teacher_is_the_only_teacher_to_the_last_bit(tiny_models: TinyModels) -> None:
    student, teacher = (
        tiny_models.path("qwen3", seed=1),
        LocalTeacher(tiny_models.path("llama", seed=2, hidden_size=48)),
    )
    with joined("cpu", longest_wait_s=60) as mesh:
        head = TeacherHead(teacher, vocabulary_size=VOCABULARY_SIZE, device=mesh.device)
        named = PanelHeads({"code": head}, weights={"code": 7.0})
        expected = losses_and_weights(mesh, student, teacher, head)
        found = losses_and_weights(mesh, student, Panel({"code": teacher}, asks_all=True), named)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_each_head_is_fetched_once_and_only_if_its_teacher_is_named(tiny_models: TinyModels) -> None:
    teachers = {name: Counted(tiny_models.path("qwen3", seed=2)) for name in ("code", "maths", "idle")}
    with joined("cpu", longest_wait_s=60) as mesh:
        heads = {
            name: TeacherHead(one, vocabulary_size=VOCABULARY_SIZE, device=mesh.device)
            for name, one in teachers.items()
        }
        panel = Panel(teachers, asks_all=False)
        losses_and_weights(mesh, tiny_models.path("qwen3", seed=1), panel, PanelHeads(heads, weights=None))
    assert [teacher.num_fetched for teacher in teachers.values()] == [1, 1, 0]


def test_rows_are_in_the_micro_batchs_order_and_sampled_ones_are_not_imitated(tiny_models: TinyModels) -> None:
    paths = {
        name: tiny_models.path("qwen3", seed=seed, hidden_size=8 * seed) for seed, name in ((2, "code"), (4, "maths"))
    }
    local = {name: LocalTeacher(path) for name, path in paths.items()}
    heads = {
        name: TeacherHead(one, vocabulary_size=VOCABULARY_SIZE, device=torch.device("cpu"))
        for name, one in local.items()
    }
    objective = Distillation(
        terms=Terms(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.5, with_entropies=True),
        teacher_head=PanelHeads(heads, weights=None),
    )
    sequences = batch_sequences()
    labels_R = torch.from_numpy(np.concatenate([sequence.labels for sequence in sequences])).long()
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(len(labels_R), 12, generator=generator)
    head = OutputHead(weight_VD=torch.randn(VOCABULARY_SIZE, 12, generator=generator))
    num_sampled = sum(sequence.num_rows for sequence in sequences[:3])
    loss = objective(
        StudentRows(hidden_RD=hidden_RD, head=head, labels_R=labels_R, num_sampled=num_sampled),
        Panel(local, asks_all=False).submit(sequences).wait(),
    )
    begin, loss_sum = 0, 0.0
    for sequence, name in zip(sequences, NAMES, strict=True):
        rows = slice(begin, begin + sequence.num_rows)
        begin = rows.stop
        p_RV = heads[name].at(1).logits(local[name].submit([sequence]).rows_RD).double().softmax(-1)
        log_q_RV = head.logits(hidden_RD[rows]).double().log_softmax(-1)
        divergence_R = (p_RV * (p_RV.log() - log_q_RV)).sum(-1)
        cross_entropy_R = -log_q_RV.gather(1, labels_R[rows, None])[:, 0]
        torch.testing.assert_close(loss.divergence_R[rows].double(), divergence_R, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.cross_entropy_R[rows].double(), cross_entropy_R, rtol=1e-4, atol=1e-5)
        entropy_R = -(p_RV * p_RV.log()).sum(-1)
        torch.testing.assert_close(loss.teacher_entropy_R[rows].double(), entropy_R, rtol=1e-4, atol=1e-5)
        loss_sum += divergence_R.sum().item() + 0.5 * cross_entropy_R.sum().item() * (rows.start >= num_sampled)
    assert loss.loss_sum.item() == pytest.approx(loss_sum, rel=1e-5)


@pytest.mark.parametrize("context", [1, 2], ids=["ranks with rows of their own", "two hold each row together"])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["each row its own teacher", "a mixture"])
def test_layouts_of_one_batch_have_the_textbooks_figures_and_gradient(
    tiny_models: TinyModels, tmp_path: Path, is_mixed: bool, context: int
) -> None:
    student = str(tiny_models.path("qwen3", seed=1))
    teachers = {
        "code": str(tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)),
        "maths": str(tiny_models.path("gemma2", seed=3, vocab_size=352)),
    }
    for groups in LAYOUTS:
        run_ranks(
            "tests.numerics.test_trainer_panel:gradients_of_layouts",
            ranks=groups * context,
            context=context,
            student=student,
            teachers=teachers,
            is_mixed=is_mixed,
            output=str(tmp_path),
        )
    expected = textbook(student, teachers, is_mixed=is_mixed)
    for groups, layouts in LAYOUTS.items():
        for number in range(len(layouts)):
            actual = load_file(tmp_path / f"{groups}-{number}.safetensors")
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                error = (actual[name] - value).norm() / value.norm()
                assert error < 1e-5, f"{groups} groups, layout {number}: {name} is off by {error}"
