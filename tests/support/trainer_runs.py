"""Short training runs on every rank, for tests of what survives an interruption."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdmesh.batching import plan_step
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.saving.checkpoint import CheckpointDirectory
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.student.weights import whole
from tests.support.trainer_parts import (
    LocalTeacher,
    build_stepper,
    build_student,
    in_copies,
    layers_of,
    random_sequences,
    step_batch,
)

VOCABULARY_SIZE = 310
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.01, warmup_steps=2, max_gradient_norm=0.5)


def batch_of_step(step: int, mesh: Mesh, teacher: LocalTeacher, *, num_sequences: int) -> StepBatch:
    """This rank's share of step `step`; every step has sequences of its own."""
    sequences = random_sequences(num_sequences, seed=1000 + step, vocabulary_size=VOCABULARY_SIZE)
    plan = plan_step([s.num_tokens for s in sequences], ranks=mesh.num_data_groups, max_tokens=64)
    return step_batch(sequences, plan[mesh.data_group], teacher, step=step, context=ContextRows.of(mesh, [""]))


def train(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    checkpoints: str,
    steps: int,
    until: int,
    save_at: int | None = None,
    kill_at: int | None = None,
    compute_dtype: str = "float32",
    lora: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    frozen: Sequence[str] = (),
    is_dual_space: bool = False,
    spreads_head: bool = False,
    num_sequences: Sequence[int] = (6,),
    shard_ranks: int | None = None,
    offloads: bool = False,
    optimizer: dict[str, Any] | None = None,
    is_compiled: bool = False,
    checkpointed_every: int | None = None,
    layers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains from the newest checkpoint to step `until`; the losses by step, and whole parameters of the algorithm.

    Step s has `num_sequences[s]` of them, which begins anew when it is at its end. Saves after step
    `save_at`. At step `kill_at` every rank kills itself after its forward and backward passes,
    before its update. `optimizer` has what is other than in OPTIMIZER.
    """
    mesh = in_copies(mesh, shard_ranks=shard_ranks)
    compared = None if layers is None else layers_of(layers)
    local_teacher = LocalTeacher(Path(teacher), layers=() if compared is None else set(compared.pairs.values()))
    model = build_student(
        Path(student),
        mesh,
        vocabulary_size=VOCABULARY_SIZE,
        compute_dtype=getattr(torch, compute_dtype),
        lora=None if lora is None else LoraConfig(**lora),
        quantization=None if quantization is None else QuantizationConfig(**quantization),
        frozen=frozen,
        dual_space_with=local_teacher if is_dual_space else None,
        offloads=offloads,
        is_compiled=is_compiled,
        checkpointed_every=checkpointed_every,
        spreads_head=spreads_head,
        layers=compared,
    )
    config = OPTIMIZER.model_copy(update=optimizer)
    stepper = build_stepper(model, local_teacher, mesh, config=config, steps=steps)
    directory = CheckpointDirectory(
        Path(checkpoints), model, stepper.optimizer, identity={"student.model": "tiny"}, steps=steps, keep=2, mesh=mesh
    )
    first = directory.restore()
    losses, distances, blanks = [], [], 0
    for step in range(first, until):
        batch = batch_of_step(step, mesh, local_teacher, num_sequences=num_sequences[step % len(num_sequences)])
        blanks += sum(not micro_batch.sequences for micro_batch in batch.micro_batches)
        if step == kill_at:
            stepper.accumulate(batch)
            os.kill(os.getpid(), signal.SIGKILL)
        stats = stepper.update(batch)
        losses.append(stats.loss_nats_per_token)
        distances.append(stats.layer_distance)
        if step + 1 == save_at:
            directory.save(next_step=step + 1)
    own = () if model.algorithm is None else model.algorithm.named_parameters()
    parameters = {name: whole(parameter, None).flatten().tolist() for name, parameter in own}
    return {"first": first, "losses": losses, "distances": distances, "blanks": blanks, "parameters": parameters}


def train_rest_and_whole(mesh: Mesh, *, other: str, **arguments: Any) -> dict[str, Any]:
    """Continues a run, then does all of it once more with its checkpoints in `other`; both runs' losses."""
    rest = train(mesh, **arguments)
    whole = train(mesh, **arguments | {"checkpoints": other})
    return {"first": rest["first"], "rest": rest["losses"], "whole": whole["losses"]}
