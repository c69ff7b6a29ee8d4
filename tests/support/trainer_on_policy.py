"""On-policy runs on every rank with services in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdmesh.batching import plan_step, shortest_first
from kdmesh.tokens import digest
from kdmesh.types import Int32Array, Sampling
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.devices import Devices
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sources.batches import MicroBatch, StepBatch
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.sources.early_rows import EarlyRows
from kdmesh_trainer.sources.judge import Judge
from kdmesh_trainer.sources.on_policy import OnPolicySource
from kdmesh_trainer.sources.order import AnswerOrder, PromptOrder
from kdmesh_trainer.sources.rollouts import Rollout, RolloutService
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.stats import StepStats
from kdmesh_trainer.step import GradientStepper
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, layers_of, random_sequences
from tests.support.trainer_rollouts import FastRollouts, LocalStudent, SlowRollouts, ThreadedRollouts

VOCABULARY_SIZE = 310
MAX_TOKENS = 64
SAMPLING = Sampling(temperature=1.0, max_new_tokens=12, stop_token_ids=tuple(range(16)))
SAMPLES_PER_PROMPT = 2
PROMPTS_PER_STEP = 3
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.01, warmup_steps=1, max_gradient_norm=0.5)


def prompts(count: int = 7) -> list[Int32Array]:
    """Prompts of uneven length."""
    random = np.random.default_rng(5)
    return [random.integers(0, VOCABULARY_SIZE, int(random.integers(2, 12))).astype(np.int32) for _ in range(count)]


def order(*, has_context: bool = False) -> PromptOrder:
    """Their order; with `has_context` the teacher reads more before each of them."""
    told = np.arange(20, 50, dtype=np.int32)
    pairs = [
        Prompt(token_ids=prompt, teacher_ids=np.concatenate([told, prompt]) if has_context else None)
        for prompt in prompts()
    ]
    return PromptOrder(pairs, per_step=PROMPTS_PER_STEP, seed=4)


class Run:
    """A student with its stepper, its teacher and its copy."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        student: str,
        teacher: str,
        steps: int,
        served: int = 0,
        optimizer: OptimizerConfig = OPTIMIZER,
        has_context: bool = False,
        answers: int = 0,
        ce_weight: float = 0.0,
        layers: dict[str, Any] | None = None,
    ) -> None:
        """`served` is the weight version that the rollout server has when the run begins; `answers` the number of the
        data's own sequences in each step.
        """
        self.mesh = mesh
        self.steps = steps
        self.order = order(has_context=has_context)
        data = random_sequences(5, seed=6, vocabulary_size=VOCABULARY_SIZE)
        self.answers = AnswerOrder(data, per_step=answers, seed=3) if answers else None
        compared = None if layers is None else layers_of(layers)
        self.teacher = LocalTeacher(Path(teacher), layers=() if compared is None else set(compared.pairs.values()))
        self.copy = LocalStudent(Path(student), vocabulary_size=VOCABULARY_SIZE, served=served)
        model = build_student(
            Path(student), mesh, vocabulary_size=VOCABULARY_SIZE, compute_dtype=torch.float32, layers=compared
        )
        self.copy.follow(model)
        self.model = model
        self.stepper: GradientStepper = build_stepper(
            model, self.teacher, mesh, config=optimizer, steps=steps, is_sampled=True, ce_weight=ce_weight
        )

    def source(
        self,
        service: RolloutService,
        *,
        max_staleness: int,
        prefetch: int = 1,
        early_rows: int = 10**6,
        devices: Devices | None = None,
        judge: Judge | None = None,
    ) -> OnPolicySource:
        """A source of this run."""
        return OnPolicySource(
            Sampler(
                self.order,
                service,
                sampling=SAMPLING,
                samples_per_prompt=SAMPLES_PER_PROMPT,
                rank=self.mesh.rank,
                ranks=self.mesh.world_size,
                judge=judge,
            ),
            self.copy,
            EarlyRows(
                self.teacher, most_rows=0 if devices is not None and devices.are_shared else early_rows, is_frozen=True
            ),
            max_staleness=max_staleness,
            max_tokens=MAX_TOKENS,
            prefetch=prefetch,
            steps=self.steps,
            mesh=self.mesh,
            answers=self.answers,
            devices=devices,
            context=ContextRows.of(self.mesh, [""]),
        )

    def train(self, source: OnPolicySource, *, first: int = 0) -> Iterator[tuple[StepBatch, StepStats]]:
        """Every step in the loop's order, publishing included."""
        source.start_at(first)
        source.publish(version=first)
        for step in range(first, self.steps):
            batch = source.next_batch()
            assert batch.step == step
            stats = self.stepper.update(batch)
            source.publish(version=step + 1)
            yield batch, stats


@contextmanager
def service_of(kind: str, copy: LocalStudent) -> Iterator[FastRollouts]:
    """A rollout service over `copy`: fast, slow or threaded."""
    if kind == "fast":
        yield FastRollouts(copy)
    elif kind == "slow":
        yield SlowRollouts(copy)
    else:
        with ThreadPoolExecutor(max_workers=3) as threads:
            yield ThreadedRollouts(copy, threads)


def losses(mesh: Mesh, *, steps: int, kind: str = "fast", max_staleness: int = 0, **models: Any) -> dict[str, Any]:
    """What every step was trained on, and its loss; `models` are further arguments of a Run."""
    run = Run(mesh, steps=steps, **models)
    with service_of(kind, run.copy) as service:
        seen = list(run.train(run.source(service, max_staleness=max_staleness)))
    return {
        "losses": [stats.loss_nats_per_token for _, stats in seen],
        "distances": [stats.layer_distance for _, stats in seen],
        "sequences": [sorted(digest([s]).hex() for m in batch.micro_batches for s in m.sequences) for batch, _ in seen],
        "num_tokens": [(batch.num_tokens, batch.num_loss_tokens, len(batch.micro_batches)) for batch, _ in seen],
        "drift": [stats.samples and stats.samples.sampler_kl_k3_nats for _, stats in seen],
        "entropies": [stats.samples and stats.samples.student_entropy_nats for _, stats in seen],
        "cross_entropies": [stats.cross_entropy_nats_per_token for _, stats in seen],
    }


def serial_losses(mesh: Mesh, *, student: str, teacher: str, steps: int) -> dict[str, Any]:
    """The same without a source: sample, score, update, one after the other."""
    run = Run(mesh, student=student, teacher=teacher, steps=steps)
    result: dict[str, Any] = {"losses": [], "sequences": []}
    for step in range(steps):
        run.copy.publish(version=step)
        rollouts = [
            Rollout.of(prompt.token_ids, run.copy.sample(prompt.token_ids, SAMPLING, seed=prompt.seed + i))
            for prompt in order().of_step(step)
            for i in range(SAMPLES_PER_PROMPT)
        ]
        plans = plan_step([r.sequence.num_tokens for r in rollouts], ranks=1, max_tokens=MAX_TOKENS)
        [plan] = shortest_first(plans, [r.sequence.num_rows for r in rollouts])
        micro_batches = [_scored([rollouts[index] for index in members], run.teacher) for members in plan]
        batch = StepBatch(
            step=step,
            micro_batches=tuple(micro_batches),
            num_loss_tokens=sum(r.sequence.num_rows for r in rollouts),
            num_tokens=sum(r.sequence.num_tokens for r in rollouts),
            loss_weight=sum(r.sequence.num_rows for r in rollouts),
        )
        result["losses"].append(run.stepper.update(batch).loss_nats_per_token)
        result["sequences"].append(sorted(digest([r.sequence]).hex() for r in rollouts))
    return result


def _scored(rollouts: Sequence[Rollout], teacher: LocalTeacher) -> MicroBatch:
    sequences = tuple(rollout.sequence for rollout in rollouts)
    return MicroBatch(sequences=sequences, teacher=teacher.submit(sequences))
