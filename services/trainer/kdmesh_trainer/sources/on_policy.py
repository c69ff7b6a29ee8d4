"""The student's own samples with a teacher's rows, which are asked for as samples come."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from kdmesh.batching import plan_step, shortest_first
from kdmesh.errors import EnvironmentFailed, JudgeFailed, ModelMismatch
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import teacher_side
from kdmesh_trainer.devices import Devices, OwnDevices
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.batches import MicroBatch, StepBatch
from kdmesh_trainer.sources.context_rows import ContextRows, asking
from kdmesh_trainer.sources.early_rows import EarlyService
from kdmesh_trainer.sources.exchange import exchange
from kdmesh_trainer.sources.order import AnswerOrder
from kdmesh_trainer.sources.rollouts import Rollout, WeightPublisher, figures_of, refuse_unanswerable
from kdmesh_trainer.sources.row_queue import RowQueue
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.sources.show import Showcase
from kdmesh_trainer.stop import StepLost

log = logging.getLogger(__name__)


class OnPolicySource:
    """A Source that samples its batches from the student, and the Publisher that brings the student there.

    The samples of step s begin on weights at most `max_staleness` updates older than those they train. As soon as new
    weights are served, everything that may be sampled from them is asked for, step by step. Which samples there are
    depends on weights and seeds alone, so with `max_staleness` 0 a run is what it would be without any overlap.

    Each rank samples from every `world_size`-th prompt, and asks the teacher for the rows of each sample as it comes.
    Then the ranks tell each other the ids, and every rank plans the same balanced micro-batches, in which most samples
    stay where they came, or in the group of ranks that trains together; of others the rank asks for the rows anew. Rows
    must be waited for in order.

    A step may hold answers of the data as well. They are planned together with the samples, which come first in every
    micro-batch.

    A sample that its judge gives weight 0 is left out: the teacher is not asked for it, and it is in no micro-batch. A
    step that nothing is left of has no loss tokens, and blank micro-batches.

    On shared devices nothing is asked for before its turn: samples when a batch is wanted, rows when all of them are
    here. That needs `max_staleness` 0.
    """

    def __init__(
        self,
        sampler: Sampler,
        weights: WeightPublisher,
        teacher: EarlyService,
        *,
        max_staleness: int,
        max_tokens: int,
        prefetch: int,
        steps: int,
        mesh: Mesh,
        answers: AnswerOrder | None = None,
        teacher_update_every: int | None = None,
        devices: Devices | None = None,
        showcase: Showcase | None = None,
        context: ContextRows | None = None,
    ) -> None:
        """
        Args:
            max_tokens: of one micro-batch.
            prefetch: micro-batches to ask the teacher for ahead of the one that is trained on.
            steps: of the whole run; nothing beyond them is sampled.
            answers: those of the data that each step holds; None: it holds samples alone.
            teacher_update_every: see RowQueue.
            devices: where all of this is computed; None: everybody has devices of their own.
            showcase: where samples are shown; None shows none.
            context: None: each rank has micro-batches of its own.
        """
        self.devices = devices or OwnDevices()
        assert max_staleness == 0 or not self.devices.are_shared
        self._sampler = sampler
        self._weights = weights
        self._early = teacher
        self._rows = RowQueue(teacher, prefetch=prefetch, extend=lambda: False, update_every=teacher_update_every)
        self._max_staleness = max_staleness
        self._max_tokens = max_tokens
        self._steps = steps
        self._mesh = mesh
        self._answers = answers
        self._showcase = showcase
        self._context = context
        self._published: dict[int, int] = {}  # weight version -> steps that its student had done, ascending
        self._next_asked = 0
        self._next_planned = 0
        self._next_given = 0
        self._planned: deque[StepBatch] = deque()  # not handed out yet

    def start_at(self, step: int) -> None:
        """Make `step` the first one that next_batch gives."""
        self._next_asked = self._next_planned = self._next_given = step
        if self._showcase is not None:
            self._showcase.start(step)

    def publish(self, *, version: int) -> None:
        """Bring the student to those who sample, and ask for what may now be sampled. Collective.

        Raises:
            StepLost: a server did not take the weights.
        """
        self.devices.publish()
        self._weights.publish(version=version)
        self._sampler.note_weights(self._weights.weight_version(version), behind=self._weights.behind)
        self._published = {**self._allowed(version), self._weights.weight_version(version): version}
        if not self.devices.are_shared:
            self._ask()

    def next_batch(self) -> StepBatch:
        """The next step's share of this rank. Collective.

        Raises:
            ModelMismatch: a sample began on weights that its step does not allow.
            EngineFailure: what a server sent is not what was asked for.
            StepLost: samples did not come; the environment failed on one, or none of a step could have a second turn;
                or the judge failed on all.
        """
        self._early.allow(self._rows.begin(self._next_given))
        self._next_given += 1
        if not self._planned:
            self.devices.sample()
            self._ask()
            self._plan_one()
            self.devices.score()
        batch = self._planned.popleft()
        self._plan_what_is_here()
        self._rows.ask_ahead()
        return batch

    def close(self) -> None:
        """Drop what was asked for and not used: that cancels it. Its rows must not be waited for any more."""
        self._planned.clear()
        self._sampler.close()
        self._rows.close()
        self._early.close()

    def _ask(self) -> None:
        """Ask for every step that the newest weights may be used for, once."""
        newest = max(self._published.values())
        while self._next_asked < min(newest + self._max_staleness + 1, self._steps):
            self._sampler.ask(
                self._next_asked,
                min_weight_version=min(self._allowed(self._next_asked)),
                on_sample=functools.partial(self._early.add, self._next_asked),
            )
            self._next_asked += 1

    def _plan_what_is_here(self) -> None:
        """Plan later steps whose samples all ranks have, so that the teacher may work on them already."""
        while self._next_planned < self._next_asked:
            # Every rank has asked for the same steps, so all come here equally often.
            if self._mesh.is_any(not self._sampler.is_here(self._next_planned)):
                return
            self._plan_one()

    def _plan_one(self) -> None:
        step = self._next_planned
        shares = exchange(self._sampler, step, what=f"step {step}", mesh=self._mesh, bring_again=self._bring_again)
        rollouts = self._sampler.assemble(step, shares)
        if self._showcase is not None:
            self._showcase.show(step, rollouts)
        try:
            refuse_unanswerable(step, rollouts)
            self._look_at_verdicts(step, rollouts)
        except (EnvironmentFailed, JudgeFailed) as error:  # on every rank
            raise StepLost(str(error)) from error
        counting = [index for index, rollout in enumerate(rollouts) if rollout.counts]
        trained = [rollouts[index] for index in counting]
        staleness = [self._staleness(step, rollout) for rollout in rollouts]
        answers = [] if self._answers is None else self._answers.of_step(step)
        datasets = Counter(self._sampler.counts(step))
        datasets.update({} if self._answers is None else self._answers.counts(step))
        sequences = [*(rollout.sequence for rollout in trained), *answers]
        asked_by = self._sampler.homes(step)
        homes = [*(self._mesh.place_of(asked_by[index]) for index in counting), *(None for _ in answers)]
        plan = plan_step(
            [s.num_tokens for s in sequences],
            ranks=self._mesh.num_data_groups,
            max_tokens=self._max_tokens,
            homes=[None if home is None else home[0] for home in homes],
        )
        # A sample of few tokens is drawn, and scored, before a long one, and one of the first prompts before others.
        drawn = [*(rollout.sequence.num_rows for rollout in trained), *(0 for _ in answers)]
        micro_batches = []
        for members in shortest_first(plan, drawn)[self._mesh.data_group]:
            own = [trained[index] for index in members if index < len(trained)]
            micro_batches.append(
                self._micro_batch(step, own, tuple(sequences[index] for index in members), [homes[i] for i in members])
            )
        asked = [s for m in micro_batches for s in (m.sequences if m.asked is None else m.asked)]
        self._early.settle(step, teacher_side(asked))
        self._planned.append(
            StepBatch(
                step=step,
                micro_batches=tuple(micro_batches),
                num_loss_tokens=sum(s.num_rows for s in sequences),
                num_tokens=sum(s.num_tokens for s in sequences),
                loss_weight=math.fsum(s.weight * s.num_rows for s in sequences),
                teacher_age_steps=self._rows.teacher_age(step),
                datasets=dict(datasets),
                rollouts=figures_of(
                    rollouts,
                    staleness,
                    waits_s=[share.wait_s for share in shares],
                    drawing_s=max(share.drawing_s for share in shares),
                ),
            )
        )
        self._next_planned += 1

    def _bring_again(self, among: Collection[str]) -> None:
        """To servers that lack them, the newest weights; see WeightPublisher. Collective."""
        self.devices.publish()
        self._weights.catch_up(among)
        self._sampler.note_weights(max(self._published), behind=self._weights.behind)
        self.devices.sample()

    def _micro_batch(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        sequences: tuple[TokenSequence, ...],
        homes: Sequence[tuple[int, int] | None],
    ) -> MicroBatch:
        """`sequences` are those of the rollouts and then those of the data; `homes` say which rank may have asked."""
        micro_batch = asking(
            sequences,
            functools.partial(self._rows.add, step=step),
            self._context,
            # Whoever asked early asks now, where it is one of those that train on it.
            homes=[home[1] if home and home[0] == self._mesh.data_group else None for home in homes],
        )
        if not rollouts:
            return micro_batch
        logprobs_S = np.concatenate([rollout.logprobs for rollout in rollouts])
        if self._context is not None:
            logprobs_S = logprobs_S[self._context.held(sequences)]
        return replace(micro_batch, rollout_logprobs_S=torch.from_numpy(logprobs_S))

    def _look_at_verdicts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        errors = [rollout.verdict.error for rollout in rollouts if rollout.verdict and rollout.verdict.error]
        if len(errors) == len(rollouts):
            raise JudgeFailed(
                f"source.judge failed on all {len(rollouts)} samples of step {step}, so that there is nothing to learn "
                f"from: {errors[0]}"
            )
        if errors and self._mesh.is_first:
            facts = {"step": step, "samples": len(errors), "why": errors[0]}
            log.warning("the judge failed, so these samples are left out", extra=facts)

    def _staleness(self, step: int, rollout: Rollout) -> int:
        """Updates of the student between the weights that began a rollout and those it trains."""
        allowed = self._allowed(step)
        if rollout.weight_version not in allowed:
            versions = ", ".join(map(str, allowed))
            raise ModelMismatch(
                f"a sample of step {step} began on weight version {rollout.weight_version}; "
                f"source.max_staleness {self._max_staleness} allows {versions}"
            )
        return step - allowed[rollout.weight_version]

    def _allowed(self, step: int) -> dict[int, int]:
        """The weights that a step may be sampled from; never those of an earlier attempt of this run."""
        return {
            weight_version: steps_done
            for weight_version, steps_done in self._published.items()
            if step - self._max_staleness <= steps_done <= step
        }
