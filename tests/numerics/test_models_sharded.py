"""Packed hidden states and their gradients are the same when FSDP2 shards the layers over two ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.head import output_head
from kdmesh.models.packing import PackedTokens, blank, pack
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

CPU = torch.device("cpu")
RANKS = 2


FAMILIES = ("qwen3", "gemma2")
"""An untied head; a tied one with soft caps and windows."""


@dataclass(frozen=True)
class Job:
    """What both ranks are told."""

    models: dict[str, Path]  # family -> directory
    results: Path

    def result(self, family: str, rank: int) -> Path:
        return self.results / f"{family}-{rank}.pt"


class Student(nn.Module):
    """Hidden states and their logits, both computed inside the root module's forward."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = load_causal_lm(path, torch.float32, CPU)

    def forward(self, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        hidden_TD = hidden_states_TD(self.model, packed)
        return hidden_TD, output_head(self.model).logits(hidden_TD[:2])


def share(rank: int) -> PackedTokens:
    """Uneven: rank 1 has fewer sequences, of other lengths."""
    lengths = [(9, 30, 2, 17), (12, 5)][rank]
    return pack(random_sequences(lengths, vocabulary_size=VOCABULARY_SIZE, seed=rank))


def run(student: Student, packed: PackedTokens) -> Tensor:
    hidden_TD, logits_CV = student(packed)
    (hidden_TD.square().sum() + logits_CV.square().sum()).backward()
    return hidden_TD.detach()


def work(rank: int, job: Job) -> None:
    dist.init_process_group("gloo", init_method=f"file://{job.results}/rendezvous", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    for family, path in job.models.items():
        student = Student(path)
        for layer in student.model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        hidden_TD = run(student, share(rank))
        gradients = {name: whole(parameter.grad) for name, parameter in student.named_parameters()}
        student(blank())  # a rank without data must be able to take part
        torch.save((hidden_TD, gradients), job.result(family, rank))
    dist.destroy_process_group()


def whole(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


@pytest.fixture(scope="module")
def job(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Done: both ranks have written their results."""
    job = Job(
        models={family: tiny_models.path(family) for family in FAMILIES}, results=tmp_path_factory.mktemp("sharded")
    )
    multiprocessing.spawn(work, args=(job,), nprocs=RANKS)
    return job


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one_process(job: Job, family: str) -> None:
    student = Student(job.models[family])
    hidden = [run(student, share(rank)) for rank in range(RANKS)]
    for rank in range(RANKS):
        actual_TD, gradients = torch.load(job.result(family, rank))
        torch.testing.assert_close(actual_TD, hidden[rank], rtol=1e-5, atol=1e-6)
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            error = (gradients[name] * RANKS - parameter.grad).norm() / parameter.grad.norm()  # FSDP averages
            assert error < 1e-5, name
