"""One batch has one loss and one gradient, however it is spread over ranks, micro-batches and packed rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.student.weights import whole
from tests.support.relative_error import relative_error
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch
from tests.support.trainer_ranks import run_ranks

# Real tokens; the models' heads are padded to different sizes above it.
VOCABULARY_SIZE = 310
NUM_SEQUENCES = 8

# rank, or group that holds each row together -> micro-batches -> sequences. Shares are uneven on purpose: equal ones
# hide a mean of means.
LAYOUTS: dict[int, dict[str, list[list[list[int]]]]] = {
    1: {
        "1 rank, packed": [[[0, 1, 2, 3, 4, 5, 6, 7]]],
        "1 rank, accumulation 2": [[[0, 5], [1, 2, 3, 4, 6, 7]]],
        "1 rank, accumulation 4": [[[7], [0, 1, 2, 3], [4, 6], [5]]],
        "1 rank, one sequence at a time": [[[0], [1], [2], [3], [4], [5], [6], [7]]],
    },
    2: {
        "2 ranks, packed": [[[0, 1, 2]], [[3, 4, 5, 6, 7]]],
        "2 ranks, accumulation 2": [[[0], [1, 2]], [[3, 4, 5, 6], [7]]],
        "2 ranks, accumulation 4 with blanks": [[[0], [1], [2], []], [[3, 4], [], [5], [6, 7]]],
        "2 ranks, all on one": [[[]], [[0, 1, 2, 3, 4, 5, 6, 7]]],
    },
}


def batch_sequences() -> list[TokenSequence]:
    return random_sequences(NUM_SEQUENCES, seed=5, vocabulary_size=VOCABULARY_SIZE)


def gradients_of_layouts(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    output: str,
    gather: Gather,
    spreads_head: bool = False,
    checkpointed_every: int | None = None,
    compute_dtype: str = "float32",
) -> None:
    """Writes every layout's losses and whole gradient to `output`; runs on every rank."""
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=getattr(torch, compute_dtype),
        spreads_head=spreads_head,
        checkpointed_every=checkpointed_every,
        gather=gather,
        unit_parameters=10**6 if gather == "step" else 1,  # all layers together, or one by one
    )
    local_teacher = LocalTeacher(Path(teacher))
    stepper = build_stepper(model, local_teacher, mesh, config=OptimizerConfig(), steps=1)
    for number, plan in enumerate(LAYOUTS[mesh.num_data_groups].values()):
        context = ContextRows.of(mesh, [""])
        batch = step_batch(batch_sequences(), plan[mesh.data_group], local_teacher, context=context)
        tally = stepper.accumulate(batch)
        totals, _ = tally.over_all_ranks()
        results = {name: whole(p.grad, None) for name, p in model.lm.named_parameters()}
        results["loss"] = torch.tensor([totals.loss, totals.divergence, totals.cross_entropy], dtype=torch.float64)
        # A teacher is asked for every token once.
        assert totals.teachers[""].tokens == batch.num_tokens
        assert totals.teachers[""].loss_tokens == batch.num_loss_tokens
        if mesh.is_first:
            save_file(results, Path(output) / f"{mesh.num_data_groups}-{number}.safetensors")


def textbook(student: Path, teacher: Path) -> dict[str, Tensor]:
    """Gradient and summed losses in float64: whole logits of Hugging Face's own forward, one sequence at a time.

    Experts of a mixture come one after the other: together they are multiplied in float32 at most.
    """
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64, experts_implementation="eager")
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    sequences = batch_sequences()
    divergence = cross_entropy = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        token_ids = torch.from_numpy(sequence.token_ids).long()[None]
        positions = torch.from_numpy(sequence.positions).long()
        log_q_RV = model(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1)
        log_p_RV = other(token_ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach()
        labels = torch.from_numpy(sequence.labels).long()
        divergence = divergence + (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum()
        cross_entropy = cross_entropy - log_q_RV.gather(1, labels[:, None]).sum()
    loss = divergence + 0.3 * cross_entropy
    (loss / sum(sequence.num_rows for sequence in sequences)).backward()
    losses = torch.stack([loss, divergence, cross_entropy]).detach()
    return {"loss": losses, **{name: p.grad for name, p in model.named_parameters()}}


# Small students are kept whole throughout a step, large ones gathered and reduced with every micro-batch.
@pytest.mark.parametrize(
    ("family", "is_tied", "gather", "spreads_head"),
    [
        ("qwen3", False, "micro_batch", False),
        ("qwen3", True, "step", False),
        pytest.param("qwen3", True, "micro_batch", True, marks=pytest.mark.slow),
        pytest.param("qwen3", False, "step", True, marks=pytest.mark.slow),
        # Mixtures, some experts of which get no token of a micro-batch; the second has a layer without experts.
        ("qwen2_moe", False, "micro_batch", False),
        ("deepseek_v3", True, "step", False),
        ("gpt_oss", False, "micro_batch", False),  # with sinks
        pytest.param("mixtral", True, "micro_batch", True, marks=pytest.mark.slow),
        pytest.param("glm4_moe", False, "micro_batch", False, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", True, "step", False, marks=pytest.mark.slow),
        # Layers of linear attention, one of them in a mixture.
        ("qwen3_5_text", False, "micro_batch", False),
        ("qwen3_next", True, "step", False),
        pytest.param("qwen3_5_moe_text", False, "micro_batch", True, marks=pytest.mark.slow),
        pytest.param("olmo_hybrid", False, "step", False, marks=pytest.mark.slow),
        # Mamba-2, in a mixture and beside attention, and short convolutions.
        ("granitemoehybrid", True, "micro_batch", False),
        pytest.param("nemotron_h", False, "step", False, marks=pytest.mark.slow),
        ("falcon_h1", True, "step", True),
        pytest.param("bamba", False, "micro_batch", False, marks=pytest.mark.slow),
        ("lfm2", True, "step", False),
        pytest.param("lfm2_moe", False, "micro_batch", True, marks=pytest.mark.slow),
        pytest.param("lfm3", True, "micro_batch", False, marks=pytest.mark.slow),
    ],
)
def test_eight_layouts_of_one_batch_have_the_textbook_loss_and_gradient(
    tiny_models: TinyModels,
    tmp_path: Path,
    family: str,
    is_tied: bool,
    gather: Gather,
    spreads_head: bool,
) -> None:
    student = tiny_models.path(family, seed=1, tie_word_embeddings=is_tied)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    for ranks in (1, 2):
        run_ranks(
            "tests.numerics.test_trainer_layouts:gradients_of_layouts",
            ranks=ranks,
            student=str(student),
            teacher=str(teacher),
            output=str(tmp_path),
            gather=gather,
            spreads_head=spreads_head,
        )
    expected = textbook(student, teacher)
    for groups in LAYOUTS:
        assert_equal(expected, tmp_path, groups)


@pytest.mark.parametrize(
    ("family", "ranks", "context"),
    [
        ("qwen3", 2, 2),
        ("qwen3", 3, 3),  # of 4 heads, so that they exchange keys
        ("qwen3_moe", 2, 2),
        ("gpt_oss", 2, 2),
        pytest.param("gpt_oss", 3, 3, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 2, 2, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 3, 3, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, 2, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hold_each_row_together_have_the_textbook_loss_and_gradient(
    tiny_models: TinyModels, tmp_path: Path, family: str, ranks: int, context: int
) -> None:
    student = tiny_models.path(family, seed=1)
    teacher = tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)
    run_ranks(
        "tests.numerics.test_trainer_layouts:gradients_of_layouts",
        ranks=ranks,
        context=context,
        student=str(student),
        teacher=str(teacher),
        output=str(tmp_path),
        gather="micro_batch" if ranks == context else "step",
        checkpointed_every=None if ranks == context else 1,
    )
    assert_equal(textbook(student, teacher), tmp_path, ranks // context)


@pytest.mark.parametrize(
    ("family", "ranks", "context", "spreads_head", "within"),
    [
        ("gpt_oss", 3, 3, False, 1.2e-2),  # of 4 heads, so that they exchange keys
        pytest.param("qwen3_moe", 2, 2, False, 4e-3, marks=pytest.mark.slow),
        pytest.param("qwen3_next", 2, 1, False, 4e-3, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, 1, True, 1.2e-2, marks=pytest.mark.slow),
    ],
)
def test_in_bfloat16_layouts_differ_by_rounding_alone(
    tiny_models: TinyModels, tmp_path: Path, family: str, ranks: int, context: int, spreads_head: bool, within: float
) -> None:
    student = tiny_models.path(family, seed=1)
    found = {}
    for dtype, number in (("float32", 1), ("bfloat16", 1), ("bfloat16", ranks)):
        output = tmp_path / f"{dtype}-{number}"
        output.mkdir()
        run_ranks(
            "tests.numerics.test_trainer_layouts:gradients_of_layouts",
            ranks=number,
            context=min(number, context),
            student=str(student),
            teacher=str(tiny_models.path("llama", seed=2, hidden_size=48, vocab_size=336)),
            output=str(output),
            gather="micro_batch",
            spreads_head=spreads_head and number > 1,
            compute_dtype=dtype,
        )
        found[dtype, number] = [load_file(path) for path in sorted(output.iterdir())]
    (exact, *_), (alone, *_) = found["float32", 1], found["bfloat16", 1]
    assert apart(alone, exact) > 1.2e-2  # what rounding costs every layout
    for actual in found["bfloat16", 1] + found["bfloat16", ranks]:
        assert apart(actual, alone) < within
        assert torch.allclose(actual["loss"], alone["loss"], rtol=1e-4)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The relative error of a whole gradient."""
    names = sorted(one.keys() - {"loss"})
    first, second = (torch.cat([each[name].flatten() for name in names]) for each in (one, other))
    return relative_error(first, second)


def assert_equal(expected: dict[str, Tensor], output: Path, groups: int) -> None:
    """What ranks wrote of every layout is what is expected."""
    for number, layout in enumerate(LAYOUTS[groups]):
        actual = load_file(output / f"{groups}-{number}.safetensors")
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            error = (actual[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{layout}: {name} is off by {error}"
