"""A student learns the same in one copy or in several, and in whichever memory it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.student.model import Student, release
from kdmesh_trainer.student.weights import without_aliases
from tests.numerics.test_trainer_teacher_copy import SAVE_AT, follow
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, in_copies
from tests.support.trainer_ranks import run_ranks
from tests.support.trainer_runs import OPTIMIZER, VOCABULARY_SIZE, batch_of_step, train

pytestmark = pytest.mark.slow

HERE = "tests.numerics.test_trainer_parallel"
RANKS, STEPS, SEQUENCES = 4, 3, 14
GATHER: tuple[Gather, ...] = ("step", "micro_batch")
# Ranks that share a copy, and whether the host keeps it.
LAYOUTS = {
    "one copy": (4, False),
    "two copies": (2, False),
    "four copies": (1, False),
    "one copy on the host": (4, True),
    "two copies on the host": (2, True),
}
LORA = LoraConfig(rank=2)


def learn_each(mesh: Mesh, *, student: str, teacher: str, output: str) -> dict[str, Any]:
    """Trains a student in each way and layout; whole weights of the first rank to `output`, figures of each."""
    layouts = LAYOUTS if mesh.world_size == RANKS else {"alone": (1, False)}
    figures = {}
    for gather in GATHER:
        for layout, (shard_ranks, offloads) in layouts.items():
            within = in_copies(mesh, shard_ranks=shard_ranks)
            weights, figures[f"{gather}, {layout}"] = _learnt(
                within, student, teacher, gather=gather, offloads=offloads
            )
            if mesh.is_first:
                save_file(weights, Path(output) / f"{gather}, {layout}.safetensors")
    return figures


def _learnt(
    mesh: Mesh, student: str, teacher: str, *, gather: Gather, offloads: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    local_teacher = LocalTeacher(Path(teacher))
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=torch.float32,
        gather=gather,
        unit_parameters=10**6,  # layers are joined, as small ones are on a GPU
        offloads=offloads,
    )
    assert all(isinstance(policy, CPUOffloadPolicy) is offloads for policy in _policies(model))
    stepper = build_stepper(model, local_teacher, mesh, config=OPTIMIZER, steps=STEPS)
    batches = [batch_of_step(step, mesh, local_teacher, num_sequences=SEQUENCES) for step in range(STEPS)]
    stats = [stepper.update(batch) for batch in batches]
    release(model)
    weights = {name: weight.whole(None).contiguous() for name, weight in without_aliases(model.weights()).items()}
    return weights, {
        "fewest micro-batches": min(len(batch.micro_batches) for batch in batches),
        "losses": [each.loss_nats_per_token for each in stats],
        "norms": [each.gradient_norm for each in stats],
        "sums": [float(tensor.double().sum()) for tensor in weights.values()],
    }


def _policies(model: Student) -> Iterator[object]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from (group.offload_policy for group in module._get_fsdp_state()._fsdp_param_groups)


def keep_each(mesh: Mesh, *, student: str, teacher: str, checkpoints: str) -> dict[str, Any]:
    """Saves a run of two copies, goes on with it in every layout, and lets a teacher follow a student of two copies."""
    run = {"student": student, "teacher": teacher, "steps": 6, "until": 6, "num_sequences": [SEQUENCES]}
    path = f"{checkpoints}/run"
    whole = train(mesh, **run, checkpoints=path, save_at=3, shard_ranks=2)
    rests = {
        layout: train(mesh, **run, checkpoints=path, shard_ranks=shard_ranks, offloads=offloads)
        for layout, (shard_ranks, offloads) in LAYOUTS.items()
    }
    return {"whole": whole, "rests": rests, **follow_each(mesh, student=student, checkpoints=checkpoints)}


def follow_each(mesh: Mesh, *, student: str, checkpoints: str) -> dict[str, Any]:
    """What becomes of a teacher's copy, of students with and without adapters, in two copies where there are ranks."""
    within = in_copies(mesh, shard_ranks=2 if mesh.world_size == RANKS else None)
    plain, adapted = (
        follow(within, path=student, checkpoints=f"{checkpoints}/{name}", every=3, decay=0.9, lora=lora)
        for name, lora in (("plain", None), ("adapted", LORA))
    )
    return {"plain": plain, "adapted": adapted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What four ranks made, and one."""

    figures: list[dict[str, Any]]  # by rank
    alone: dict[str, Any]
    begun: dict[str, Tensor]  # the weights before the first step
    output: Path

    def weights(self, gather: Gather, layout: str) -> dict[str, Tensor]:
        """Of a student, after its last step."""
        return load_file(self.output / f"{gather}, {layout}.safetensors")


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, str]:
    return tiny_models.student_and_teacher()


@pytest.fixture(scope="module")
def outcome(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    output = tmp_path_factory.mktemp("learnt")
    figures = run_ranks(f"{HERE}:learn_each", ranks=RANKS, **models, output=str(output))
    [alone] = run_ranks(f"{HERE}:learn_each", ranks=1, **models, output=str(output))
    begun = load_file(Path(models["student"]) / "model.safetensors")
    return Outcome(figures=figures, alone=alone, begun=begun, output=output)


@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_learns_what_one_process_does(outcome: Outcome, gather: Gather, layout: str) -> None:
    expected, actual = outcome.alone[f"{gather}, alone"], outcome.figures[0][f"{gather}, {layout}"]
    assert actual["fewest micro-batches"] > 1
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert OPTIMIZER.max_gradient_norm is not None
    assert min(actual["norms"]) > OPTIMIZER.max_gradient_norm, "the norm decided nothing"
    weights = outcome.weights(gather, "alone")
    for name, value in outcome.weights(gather, layout).items():
        error = (value - weights[name]).norm() / (weights[name] - outcome.begun[name]).norm()
        assert error < 1e-3, f"{name} is off by {error} of what it learnt"


@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_copies_are_the_same(outcome: Outcome, gather: Gather, layout: str) -> None:
    first, *others = (figures[f"{gather}, {layout}"] for figures in outcome.figures)
    assert all(other["sums"] == first["sums"] for other in others)


@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize("layout", ["one copy", "two copies"])
def test_on_the_host_it_is_the_same_to_the_bit(outcome: Outcome, gather: Gather, layout: str) -> None:
    here, there = outcome.weights(gather, layout), outcome.weights(gather, f"{layout} on the host")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], value) for name, value in there.items())


def test_a_run_goes_on_in_every_layout_and_a_teacher_follows_every_copy(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = run_ranks(f"{HERE}:keep_each", ranks=RANKS, **models, checkpoints=str(tmp_path))
    assert all(other == first for other in others)
    whole, rests = first["whole"]["losses"], first["rests"]
    for layout, rest in rests.items():
        assert rest["first"] == 3
        exact = layout.startswith("two copies")
        assert rest["losses"] == (whole[3:] if exact else pytest.approx(whole[3:], rel=1e-5)), layout
    [alone] = run_ranks(f"{HERE}:follow_each", ranks=1, student=models["student"], checkpoints=str(tmp_path))
    assert alone["plain"]["first"] == SAVE_AT
    assert alone["plain"]["digests"] == first["plain"]["digests"][SAVE_AT:]
    assert max(first[kind]["error"] for kind in ("plain", "adapted")) < 2e-6
