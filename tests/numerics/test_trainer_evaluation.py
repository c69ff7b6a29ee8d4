"""What held-out evaluation says of a student, and of the model it is written as."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.types import TokenSequence
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.stop import AgreedStop, Stopping, StopSignals
from kdmesh_trainer.student.model import Student
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

VOCABULARY_SIZE = 310
HERE = "tests.numerics.test_trainer_evaluation"


def held_out() -> list[TokenSequence]:
    return random_sequences(5, seed=9, vocabulary_size=VOCABULARY_SIZE)


def build_evaluator(
    student: Student,
    teacher: LocalTeacher | None,
    mesh: Mesh,
    max_tokens: int,
    parts: dict[str, int] | None = None,
) -> HeldOutEvaluator:
    head = None
    if teacher is not None:
        head = TeacherHead(teacher, vocabulary_size=VOCABULARY_SIZE, device=mesh.device)
    return HeldOutEvaluator(
        student,
        held_out(),
        teacher=teacher,
        teacher_head=head,
        max_tokens=max_tokens,
        prefetch=1,
        mesh=mesh,
        parts=parts,
    )


def evaluate(
    mesh: Mesh, *, student: str, teacher: str | None, max_tokens: int = 64, parts: dict[str, int] | None = None
) -> dict[str, float | None]:
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    local_teacher = None if teacher is None else LocalTeacher(Path(teacher))
    return build_evaluator(model, local_teacher, mesh, max_tokens, parts).evaluate().figures()


def textbook_scores(student: Path, teacher: Path, which: slice = slice(None)) -> tuple[float, float, float]:
    """KL, cross-entropy and top-1 agreement from whole logits of Hugging Face's own forward in float64."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    kl = entropy = agreement = 0.0
    for sequence in held_out()[which]:
        ids, positions = torch.from_numpy(sequence.token_ids).long()[None], torch.from_numpy(sequence.positions).long()
        with torch.no_grad():
            q_RV, p_RV = (m(ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1) for m in (model, other))
        kl += float((p_RV.exp() * (p_RV - q_RV)).sum())
        entropy += float(cross_entropy(q_RV, torch.from_numpy(sequence.labels).long(), reduction="sum"))
        agreement += float((q_RV.argmax(-1) == p_RV.argmax(-1)).sum())
    count = sum(sequence.num_rows for sequence in held_out()[which])
    return kl / count, entropy / count, agreement / count


def test_scores_are_per_token_averages_over_all_ranks(tiny_models: TinyModels) -> None:
    student, teacher = tiny_models.path("qwen3", seed=1), tiny_models.path("qwen3", seed=2)
    kl, entropy, agreement = textbook_scores(student, teacher)
    for ranks, max_tokens in ((1, 1000), (1, 40), (2, 64)):
        scores = run_ranks(
            f"{HERE}:evaluate", ranks=ranks, student=str(student), teacher=str(teacher), max_tokens=max_tokens
        )[-1]
        assert scores["kl_nats_per_token"] == pytest.approx(kl, rel=1e-5)
        assert scores["cross_entropy_nats_per_token"] == pytest.approx(entropy, rel=1e-5)
        assert scores["top1_agreement"] == pytest.approx(agreement, abs=1e-12)
        assert scores["num_loss_tokens"] == sum(sequence.num_rows for sequence in held_out())
        assert scores["num_sequences"] == 5


def test_several_datasets_are_scored_apart_and_together(tiny_models: TinyModels) -> None:
    student, teacher = tiny_models.path("qwen3", seed=1), tiny_models.path("qwen3", seed=2)
    for ranks in (1, 2):
        scores = run_ranks(
            f"{HERE}:evaluate",
            ranks=ranks,
            student=str(student),
            teacher=str(teacher),
            parts={"code": 2, "talk": 3},
        )[-1]
        for name, which in {"": slice(None), ".code": slice(2), ".talk": slice(2, None)}.items():
            kl, entropy, agreement = textbook_scores(student, teacher, which)
            assert scores[f"kl_nats_per_token{name}"] == pytest.approx(kl, rel=1e-5)
            assert scores[f"cross_entropy_nats_per_token{name}"] == pytest.approx(entropy, rel=1e-5)
            assert scores[f"top1_agreement{name}"] == pytest.approx(agreement, abs=1e-12)
            assert scores[f"num_sequences{name}"] == len(held_out()[which])


def test_a_model_distilled_from_itself_starts_at_zero(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("qwen3", seed=1))
    (scores,) = run_ranks(f"{HERE}:evaluate", ranks=1, student=path, teacher=path)
    assert abs(scores["kl_nats_per_token"]) < 1e-6
    assert scores["top1_agreement"] == 1


def test_without_a_teacher_only_the_data_judges(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen3", seed=1)
    (scores,) = run_ranks(f"{HERE}:evaluate", ranks=1, student=str(path), teacher=None)
    assert scores["kl_nats_per_token"] is None
    assert scores["top1_agreement"] is None
    assert scores["cross_entropy_nats_per_token"] == pytest.approx(textbook_scores(path, path)[1], rel=1e-5)


class AskedLater:
    """Signals of a rank that gets one after so many looks; None: it gets none."""

    def __init__(self, looks: int | None) -> None:
        self.looks = 0
        self._last = looks

    @property
    def is_asked(self) -> bool:
        self.looks += 1
        return self.looks == self._last


def interrupt(mesh: Mesh, *, student: str, teacher: str) -> dict[str, Any]:
    """Looks for a signal until the evaluation ended, what one that is not disturbed finds afterwards, and how many."""
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    evaluator = build_evaluator(model, LocalTeacher(Path(teacher)), mesh, max_tokens=40)
    signals, none = AskedLater(2 if mesh.rank == 1 else None), AskedLater(None)
    with pytest.raises(Stopping):
        evaluator.evaluate(stop=AgreedStop(cast(StopSignals, signals), mesh))
    whole = evaluator.evaluate(stop=AgreedStop(cast(StopSignals, none), mesh))
    return {"looks": [signals.looks, none.looks], "kl": whole.kl_nats_per_token}


def test_an_evaluation_ends_on_all_ranks_when_one_is_to_stop_and_leaves_nothing(tiny_models: TinyModels) -> None:
    student, teacher = tiny_models.path("qwen3", seed=1), tiny_models.path("qwen3", seed=2)
    first, second = run_ranks(f"{HERE}:interrupt", ranks=2, student=str(student), teacher=str(teacher))
    assert first == second
    assert first["looks"] == [2, 2]  # the second of two micro-batches is not judged
    assert first["kl"] == pytest.approx(textbook_scores(student, teacher)[0], rel=1e-5)


def train_and_export(mesh: Mesh, *, student: str, teacher: str, output: str) -> float:
    """Trains three steps with evaluations in between, writes the model, and returns its held-out cross-entropy."""
    model = build_student(Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32)
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(learning_rate=1e-2), steps=3)
    evaluator = build_evaluator(model, local_teacher, mesh, max_tokens=64)
    tokenizer = load_tokenizer(Path(student))
    assert tokenizer is not None
    tokenizer.chat_template = "{{ messages }} of its own"
    exporter = HuggingFaceExporter(Path(output) / "final", model, origin=Path(student), tokenizer=tokenizer, mesh=mesh)
    plans = [[[0, 1, 2]], [[3, 4]]]
    for step in range(3):
        evaluator.evaluate()
        stepper.update(step_batch(held_out(), plans[mesh.rank], local_teacher, step=step))
        exporter.export()
    return evaluator.evaluate().cross_entropy_nats_per_token


@pytest.mark.parametrize(
    ("is_tied", "dtype"), [(True, torch.float32), pytest.param(False, torch.bfloat16, marks=pytest.mark.slow)]
)
def test_the_written_model_is_the_trained_one(
    tiny_models: TinyModels, tmp_path: Path, is_tied: bool, dtype: torch.dtype
) -> None:
    student = tiny_models.path("qwen3", seed=1, tie_word_embeddings=is_tied, dtype=dtype)
    trained, *_ = run_ranks(
        f"{HERE}:train_and_export",
        ranks=2,
        student=str(student),
        teacher=str(tiny_models.path("qwen3", seed=2)),
        output=str(tmp_path),
    )
    written = tmp_path / "final"
    exactly = 1e-5 if dtype == torch.float32 else 2e-2
    assert textbook_scores(written, written)[1] == pytest.approx(trained, rel=exactly)
    assert abs(textbook_scores(student, student)[1] - trained) > 0.1
    assert AutoModelForCausalLM.from_pretrained(written, dtype="auto").dtype == dtype
    assert AutoTokenizer.from_pretrained(written).chat_template == "{{ messages }} of its own"
    with safe_open(written / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not is_tied)  # noqa: SIM118
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
