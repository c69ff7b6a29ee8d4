"""One optimizer step over this rank's micro-batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.profiler import record_function

from kdmesh.errors import NotFinite
from kdmesh.losses import FusedLoss, OutputHead
from kdmesh.models.packing import moved
from kdmesh.types import TokenSequence
from kdmesh_trainer.algorithms.seam import StudentRows
from kdmesh_trainer.data.encoding.sides import answered_rows
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.layered import LayeredLoss
from kdmesh_trainer.objectives.objective import Objective
from kdmesh_trainer.optimization.learning_rate import learning_rate
from kdmesh_trainer.optimization.optimizer import set_learning_rate
from kdmesh_trainer.random_state import random_state, set_random_state
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sources.batches import MicroBatch, PanelRows, StepBatch, copied
from kdmesh_trainer.sources.outage import Outage
from kdmesh_trainer.stats import StepStats
from kdmesh_trainer.stop import StepLost
from kdmesh_trainer.student.model import LossTotals, Student, begin_micro_batch
from kdmesh_trainer.student.shards import norm_over_ranks
from kdmesh_trainer.tally import Tally

log = logging.getLogger(__name__)


class GradientStepper:
    """Updates the student by the gradient of a batch."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        optimizer: Optimizer,
        *,
        config: OptimizerConfig,
        steps: int,
        mesh: Mesh,
        teachers: Sequence[str] = ("",),
        outage: Outage | None = None,
    ) -> None:
        """`teachers` and `outage` are as Tally has them."""
        self._student = student.train()
        self._objective = objective
        self.optimizer = optimizer
        self._config = config
        self._steps = steps
        self._mesh = mesh
        self._teachers = teachers
        self._outage = outage

    def update(self, batch: StepBatch) -> StepStats:
        """One optimizer step. Collective.

        Raises:
            NotFinite: the loss or its gradient is not finite; every rank raises it.
            ModelMismatch: the teacher's rows are not all of one weight version.
            StepLost: rows of the teacher did not come; every rank raises it.

            After any of these the weights are as they were before, and the run is over. After StepLost, so are random
            states: a checkpoint may be written.

        A batch without weight, of which every rank has the same, changes nothing.
        """
        rate = learning_rate(self._config, step=batch.step, steps=self._steps)
        if batch.loss_weight == 0:
            return self._skipped(batch, rate)
        random = random_state(self._mesh.device)
        tally = self.accumulate(batch)
        trained = self._student.parameters_apart()
        with record_function("gradient norm"):
            norms = [_gradient_norm(parameters) for parameters in trained]
        try:
            with record_function("figures of all ranks"):
                totals, (gradient_norm, *others) = tally.over_all_ranks(*norms)
        except StepLost:
            self.optimizer.zero_grad(set_to_none=True)
            set_random_state(random, self._mesh.device)
            raise
        loss = totals.loss / batch.num_loss_tokens
        if not all(math.isfinite(number) for number in (loss, gradient_norm, *others)):
            raise NotFinite(
                f"step {batch.step} has loss {loss} and gradient norm {gradient_norm}, which must be finite; "
                "nothing was updated. A lower optimizer.learning_rate or student.compute_dtype float32 may help"
            )
        assert max(totals.num_diverging, totals.num_labelled) == batch.num_loss_tokens, "not the whole step"
        with record_function("optimizer"):
            self._descend(trained, norms, rate)
        return StepStats(
            loss_nats_per_token=loss,
            divergence_nats_per_token=totals.divergence_nats_per_token,
            cross_entropy_nats_per_token=totals.cross_entropy_nats_per_token,
            top1_agreement=totals.top1_agreement_per_token,
            topk_overlap=totals.topk_overlap_per_token,
            layer_distance=totals.layer_distance,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            num_loss_tokens=batch.num_loss_tokens,
            num_tokens=batch.num_tokens,
            teacher_wait_s=totals.teacher_wait_s,
            teacher_age_steps=batch.teacher_age_steps,
            rollouts=batch.rollouts,
            samples=totals.samples,
            teachers={name: figures for name, figures in totals.teachers.items() if name},
            datasets=batch.datasets,
        )

    def accumulate(self, batch: StepBatch) -> Tally:
        """Leave the batch's gradient in the student's parameters, in place of any other. Collective.

        The objective is (sum of weight * per-token loss over all ranks) / (weight of the loss tokens of all
        ranks), so it does not depend on how tokens were split. Weights are taken relative to their mean, as they
        may be smaller or larger than what float32 holds, and the sum divided by the number of tokens. FSDP averages
        gradients over ranks, hence the factor world_size. Every rank must pass the same number of micro-batches.
        """
        if not self._student.training:  # an evaluation came before
            self._student.train()
        self.optimizer.zero_grad(set_to_none=True)
        tally = Tally(self._mesh, teachers=self._teachers, outage=self._outage)
        objective = self._objective.at(batch.step)
        mean_weight = batch.loss_weight / batch.num_loss_tokens
        scale = self._mesh.world_size / batch.num_loss_tokens
        for micro_batch in batch.micro_batches:
            begin_micro_batch(self._student, is_last=micro_batch is batch.micro_batches[-1])
            totals = forward(self._student, objective, micro_batch, tally, self._mesh.device, mean_weight=mean_weight)
            with record_function("backward"):
                (totals.loss_sum * scale).backward()  # type: ignore[no-untyped-call]
            tally.add(totals)
        return tally

    def _skipped(self, batch: StepBatch, rate: float) -> StepStats:
        """Not even by the optimizer's decay."""
        if self._mesh.is_first:
            log.warning("no sample of this step has weight, so it is skipped", extra={"step": batch.step})
        return StepStats(
            loss_nats_per_token=None,
            divergence_nats_per_token=None,
            cross_entropy_nats_per_token=None,
            top1_agreement=None,
            gradient_norm=None,
            learning_rate=rate,
            num_loss_tokens=0,
            num_tokens=0,
            teacher_wait_s=0.0,
            teacher_age_steps=batch.teacher_age_steps,
            rollouts=batch.rollouts,
            datasets=batch.datasets,
        )

    def _descend(self, trained: Sequence[Sequence[nn.Parameter]], norms: Sequence[Tensor], rate: float) -> None:
        if self._config.max_gradient_norm is not None:
            for parameters, norm in zip(trained, norms, strict=True):
                clip_grads_with_norm_(parameters, self._config.max_gradient_norm, norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def forward(
    student: Student,
    objective: Objective,
    micro_batch: MicroBatch,
    tally: Tally,
    device: torch.device,
    *,
    mean_weight: float = 1.0,
) -> LossTotals:
    """The loss of one micro-batch. Collective; a rank without sequences passes a blank.

    Args:
        mean_weight: what a row's weight must be for it to count once.
    """

    def row_loss(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor, *layers: Tensor) -> FusedLoss:
        # Only here are the rows held: their memory is the teacher's again before the backward pass.
        with record_function("wait for the teacher"):
            # Also where none of the rows is this rank's: others may need those that it asked for.
            answered = tally.wait(micro_batch)
            if student.share is not None and answered is not None:  # the loss waits for the rows of all ranks
                assert not isinstance(answered, PanelRows)
                answered = copied(answered, device)
        with record_function("head and loss"):
            sequences = micro_batch.sequences if micro_batch.held is None else micro_batch.held
            rows = StudentRows(
                hidden_RD=hidden_RD,
                head=head,
                labels_R=labels_R,
                num_sampled=micro_batch.num_sampled_rows,
                sequences=sequences,
                weight_R=_weights(sequences, mean_weight, hidden_RD.device),
                layers=layers,
            )
            loss = objective(rows, answered if len(labels_R) else None)
            if isinstance(loss, LayeredLoss):
                tally.look_at_layers(loss.layer_distance_R)
            tally.look_at_samples(loss, micro_batch.rollout_logprobs_S, answered_A=answered_rows(sequences))
        return loss

    with record_function("pack"):
        packed = student.pack(micro_batch.sequences).to(device)
    totals: LossTotals = student(packed, row_loss)
    return totals


def _weights(sequences: Sequence[TokenSequence], mean: float, device: torch.device) -> Tensor | None:
    """[R] how often each row counts; None: all count once."""
    if all(sequence.weight == mean for sequence in sequences):
        return None
    weights = [sequence.weight / mean for sequence in sequences]
    return moved(torch.from_numpy(np.repeat(np.array(weights, np.float32), [s.num_rows for s in sequences])), device)


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[] the norm of their whole gradient, over all shards. Collective."""
    return norm_over_ranks([p.grad for p in parameters if p.grad is not None])
