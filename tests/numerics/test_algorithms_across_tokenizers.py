"""Objectives over two tokenizers' tokens of real texts, against textbook formulas in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.losses import ChunkRows, FusedLoss, LabelledRows, MixedTeacher, OutputHead, forward_kl
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.build import resolve_algorithm
from kdmesh_trainer.algorithms.seam import Setup, StudentRows, Terms
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.sides import InChunks
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.objectives.head import Target
from kdmesh_trainer.objectives.objective import Distillation
from kdmesh_trainer.sections.algorithm_config import AlgorithmConfig, ByRank, ChunkLikelihood, Hybrid
from kdmesh_trainer.sources.batches import PanelRows, TeacherRows
from tests.support.chunk_cases import ChunkInputs, TextbookEnds, expected, expected_debiased, likelihood
from tests.support.device_reads import Reads
from tests.support.other_tokenizers import save_sentence_piece
from tests.support.tiny_models import save_tokenizer

_EDGES = ("student_begins_C", "student_ends_C", "teacher_begins_C", "teacher_ends_C")
CHATS = (
    "The text is wrapped at width 70.\n\nNaïve façade: 日本語 🎉!",
    "    def wrap(self, text):\n        return self._wrap_chunks(text)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The teacher's, of one version."""

    rows_RD: Tensor
    weight_version: int = 1


class WholeHeads:
    """Of the only teacher, which has another tokenizer."""

    names = ("",)

    def __init__(self, head: OutputHead) -> None:
        self._head = head

    def targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        raise AssertionError("nobody asks for shared tokens here")

    def whole_targets(self, rows: TeacherRows | PanelRows) -> tuple[Target, ...]:
        assert not isinstance(rows, PanelRows)
        return (Target(index_R=None, teachers=(MixedTeacher(hidden_RE=rows.rows_RD, head=self._head, weight=1.0),)),)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Two chats under both tokenizers, with random rows and heads."""

    encoder: OtherTokenizerEncoder
    sequences: tuple[InChunks, ...]
    made: ChunkInputs
    word_begins: tuple[list[int], list[int]]  # the tokens of each that begin words, or end the turn


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory: Path = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(directory / "student")
    save_sentence_piece(directory / "teacher")
    student = load_fast_tokenizer(directory / "student")
    teacher = load_fast_tokenizer(directory / "teacher", whose="teacher")
    encoder = OtherTokenizerEncoder(student, teacher, takes_chunks=True)
    chats = [
        Chat(messages=(Message(role="user", content="ask"), Message(role="assistant", content=text)), origin="a test")
        for text in CHATS
    ]
    sequences: list[InChunks] = []
    for found in encoder.encode(chats):
        assert isinstance(found, list)
        sequences += [sequence for sequence in found if isinstance(sequence, InChunks)]
    made = _made(sequences, len(student), len(teacher))
    begins = _word_begins(student, teacher, "<|im_end|>"), _word_begins(teacher, student, "</s>")
    return World(encoder=encoder, sequences=tuple(sequences), made=made, word_begins=begins)


def _word_begins(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, end: str) -> list[int]:
    own, theirs = token_bytes(tokenizer), token_bytes(other)
    inside = b"".join(re.sub(rb"^[ \t\n\r]+", b"", piece) for piece in (*own, *theirs) if piece)
    bounds = [byte for byte in (b" ", b"\t", b"\n", b"\r") if byte not in inside]
    begins = [number for number, piece in enumerate(own) if piece and piece[:1] in bounds]
    return sorted({tokenizer.get_vocab()[end], *begins})


def _made(sequences: list[InChunks], own_size: int, their_size: int) -> ChunkInputs:
    generator = torch.Generator().manual_seed(5)

    def side(rows: list[TokenSequence], size: int, hidden: int) -> LabelledRows:
        labels_R = torch.from_numpy(np.concatenate([each.labels for each in rows]).astype(np.int64))
        return LabelledRows(
            hidden_RD=torch.randn(len(labels_R), hidden, generator=generator, dtype=torch.float64),
            head=OutputHead(weight_VD=torch.randn(size, hidden, generator=generator, dtype=torch.float64)),
            labels_R=labels_R,
        )

    student = side(list(sequences), own_size, 6)
    student.hidden_RD.requires_grad_()
    student.head.weight_VD.requires_grad_()
    first, second = sequences
    edges = [
        np.concatenate([getattr(first.chunks, name), getattr(second.chunks, name) + shift]).astype(np.int64)
        for name, shift in (
            ("student_begins", first.num_rows),
            ("student_ends", first.num_rows),
            ("teacher_begins", first.teacher.num_rows),
            ("teacher_ends", first.teacher.num_rows),
        )
    ]
    return ChunkInputs(
        student=student,
        teacher=side([sequence.teacher for sequence in sequences], their_size, 9),
        chunks=ChunkRows(**dict(zip(_EDGES, map(torch.from_numpy, edges), strict=True))),
    )


def objective(world: World, algorithm: AlgorithmConfig, *, temperature: float = 1.0) -> Distillation:
    made = world.made
    built = resolve_algorithm(algorithm)(
        Setup(
            student_head=made.student.head.detached(),
            teacher_heads=lambda: {"": made.teacher.head},
            shared=world.encoder.shared,
            device=torch.device("cpu"),
            boundaries=world.encoder.teacher_tokens(with_boundaries=True).boundaries,
        )
    )
    return Distillation(
        terms=Terms(divergence=forward_kl, temperature=temperature, kd_weight=0.7, ce_weight=0.2),
        algorithm=built,
        teacher_head=WholeHeads(made.teacher.head),
    )


def loss_of(world: World, objective: Distillation, *, num_sampled: int = 0) -> FusedLoss:
    student, rows = world.made.student, Rows(rows_RD=world.made.teacher.hidden_RD)
    return objective(
        StudentRows(
            hidden_RD=student.hidden_RD,
            head=student.head,
            labels_R=student.labels_R,
            num_sampled=num_sampled,
            sequences=world.sequences,
        ),
        rows,
    )


def run(world: World, algorithm: AlgorithmConfig, *, num_sampled: int = 0, temperature: float = 1.0) -> FusedLoss:
    return loss_of(world, objective(world, algorithm, temperature=temperature), num_sampled=num_sampled)


OfChunk = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def of_likelihood(log_q: Tensor, own: Tensor, log_p: Tensor, their: Tensor) -> Tensor:
    a, b = ((likelihood(*side) / 30 - 1e-6).exp() for side in ((log_p, their), (log_q, own)))
    return 30 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())


def of_rank(log_q: Tensor, own: Tensor, log_p: Tensor, their: Tensor) -> Tensor:
    q, p = (log[0].exp().sort(descending=True).values for log in (log_q, log_p))
    width = max(len(q), len(p))
    return (torch.cat([q, q.new_zeros(width - len(q))]) - torch.cat([p, p.new_zeros(width - len(p))])).abs().sum()


def of_hybrid(world: World) -> OfChunk:
    shared = world.encoder.shared
    own_ids, their_ids = (torch.from_numpy(ids.astype(np.int64)) for ids in (shared.student_ids, shared.teacher_ids))

    def of_chunk(log_q: Tensor, own: Tensor, log_p: Tensor, their: Tensor) -> Tensor:
        q, p = (log[0].exp() * likelihood(log[1:], labels[1:]).exp() for log, labels in ((log_q, own), (log_p, their)))
        part = len(their_ids) / len(p)
        m = 0.25 * p[their_ids] + 0.75 * q[own_ids]
        same = 0.25 * (p[their_ids] * (p[their_ids] / m).log()) + 0.75 * (q[own_ids] * (q[own_ids] / m).log())
        rest = [
            values[[token for token in range(len(values)) if token not in set(ids.tolist())]]
            for values, ids in ((q, own_ids), (p, their_ids))
        ]
        width = max(map(len, rest))
        q_rest, p_rest = (
            torch.cat([values.sort(descending=True).values, values.new_zeros(width - len(values))]) for values in rest
        )
        return part * same.sum() + (1 - part) * (q_rest - p_rest).abs().sum()

    return of_chunk


@pytest.mark.parametrize("name", ["alm", "uld", "gold"])
@pytest.mark.parametrize("num_sampled", [0, 7])
def test_an_objective_over_two_tokenizers_is_the_textbooks(world: World, name: str, num_sampled: int) -> None:
    configs: dict[str, tuple[AlgorithmConfig, OfChunk, float]] = {
        "alm": (ChunkLikelihood(name="alm", tau=30.0), of_likelihood, 1.0),
        "uld": (ByRank(name="uld"), of_rank, 1.6),
        "gold": (Hybrid(name="gold", beta=0.25), of_hybrid(world), 1.6),
    }
    algorithm, of_chunk, temperature = configs[name]
    loss = run(world, algorithm, num_sampled=num_sampled, temperature=temperature)
    made = world.made
    log_q_RV = made.student.head.logits(made.student.hidden_RD).log_softmax(-1)
    cross_entropy_R = -log_q_RV.gather(-1, made.student.labels_R[:, None])[:, 0]
    value_C, loss_sum, *gradients = expected(made, of_chunk, temperature)
    imitated = torch.autograd.grad(cross_entropy_R[num_sampled:].sum(), made.leaves)
    torch.testing.assert_close(loss.divergence_R, value_C, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.cross_entropy_R, cross_entropy_R.detach(), rtol=1e-9, atol=1e-9)
    whole = 0.7 * loss_sum + 0.2 * cross_entropy_R[num_sampled:].detach().sum()
    torch.testing.assert_close(loss.loss_sum.detach(), whole, rtol=1e-6, atol=1e-6)
    # `expected` has the gradient of -1.5 times the loss.
    for mine, theirs, labels in zip(torch.autograd.grad(loss.loss_sum, made.leaves), gradients, imitated, strict=True):
        torch.testing.assert_close(mine, 0.7 * theirs / -1.5 + 0.2 * labels, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_what_may_follow_a_run_is_a_word_or_the_end_of_the_turn(world: World, least: float) -> None:
    # Nothing is left out between the runs of a chat's only answer, and nothing follows its last one.
    counts = [len(sequence.chunks.student_begins) for sequence in world.sequences]
    ends = TextbookEnds(
        followed=[place < count - 1 for count in counts for place in range(count)],
        student_tokens=world.word_begins[0],
        teacher_tokens=world.word_begins[1],
        least=least,
    )

    def of_likelihoods(log_q: Tensor, log_p: Tensor) -> Tensor:
        a, b = ((log / 30 - 1e-6).exp() for log in (log_p, log_q))
        return 30 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())

    loss = run(world, ChunkLikelihood(name="alm", tau=30.0, debias_above=least))
    value_G, loss_sum, *gradients = expected_debiased(world.made, ends, of_likelihoods)
    assert len(value_G) == sum(counts) if least == 0 else 2 < len(value_G) < sum(counts)
    torch.testing.assert_close(loss.divergence_R, value_G, rtol=1e-6, atol=1e-6)
    student = world.made.student
    log_q_RV = student.head.logits(student.hidden_RD).log_softmax(-1)
    cross_entropy = -log_q_RV.gather(-1, student.labels_R[:, None]).sum()
    torch.testing.assert_close(loss.loss_sum.detach(), 0.7 * loss_sum + 0.2 * cross_entropy.detach())
    imitated = torch.autograd.grad(cross_entropy, world.made.leaves)
    found = torch.autograd.grad(loss.loss_sum, world.made.leaves)
    for mine, theirs, labels in zip(found, gradients, imitated, strict=True):
        torch.testing.assert_close(mine, 0.7 * theirs / -1.5 + 0.2 * labels, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "num_reads"),
    [
        (ChunkLikelihood(name="alm", tau=30.0), 0),
        (ByRank(name="uld"), 0),
        (Hybrid(name="gold", beta=0.25), 0),
        (ChunkLikelihood(name="alm", tau=30.0, debias_above=0.1), 1),  # in how many runs the teacher goes on
    ],
    ids=["alm", "uld", "gold", "alm, debiased"],
)
def test_numbers_are_read_off_the_device_only_for_runs_that_the_teacher_ends(
    world: World, algorithm: AlgorithmConfig, num_reads: int
) -> None:
    made = objective(world, algorithm)
    loss_of(world, made)  # what a vocabulary has alone is found
    with Reads() as reads:
        loss_of(world, made, num_sampled=3)
    assert reads.seen == ["tolist"] * num_reads
