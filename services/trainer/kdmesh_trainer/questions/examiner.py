"""Asks the student questions through rollout servers, and says how it answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from kdmesh.errors import KdmeshError, ModelMismatch
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.devices import Devices
from kdmesh_trainer.loop import Stop
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.exam import Exam
from kdmesh_trainer.questions.grading import KeepAnswers, TakeAnswered, graded, tell_of_errors
from kdmesh_trainer.questions.scores import Answered, AnswerScores, Response, scores_of
from kdmesh_trainer.sources.exchange import exchange
from kdmesh_trainer.sources.order import StepPrompt
from kdmesh_trainer.sources.rollouts import Rollout, RolloutService, WeightPublisher
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.stop import NEVER, Stopping

log = logging.getLogger(__name__)

# Of one rank, in one group; two groups are under way, so that servers always have something to do.
_SAMPLES_TOGETHER = 128
_GROUPS_AHEAD = 2
_TELL_EVERY_S = 10.0


class AskedWeights(Protocol):
    """The weights that answer."""

    def bring(self, *, done: int) -> int:
        """Have the servers be the student after `done` steps; its weight version, 0 for whichever. Collective.

        Raises:
            StepLost: a server did not take the weights.
        """
        ...

    def bring_again(self, among: Collection[str]) -> None:
        """The same to servers that came back without, those `among` included. Collective."""
        ...


class StudentWeights:
    """Of a student in training."""

    def __init__(self, publisher: WeightPublisher, service: RolloutService, *, are_published: bool) -> None:
        """
        Args:
            are_published: after every step, by somebody else.
        """
        self._publisher = publisher
        self._service = service
        self._are_published = are_published
        self._version = 0

    def bring(self, *, done: int) -> int:
        """See AskedWeights."""
        if not self._are_published:
            self._publisher.publish(version=done)
        self._version = self._publisher.weight_version(done)
        if not self._are_published:
            self._service.note_weights(self._version, behind=self._publisher.behind)
        return self._version

    def bring_again(self, among: Collection[str]) -> None:
        """See AskedWeights."""
        self._publisher.catch_up(among)
        self._service.note_weights(self._version, behind=self._publisher.behind)


class ServedWeights:
    """Of servers that are asked as they are."""

    def bring(self, *, done: int) -> int:
        """See AskedWeights."""
        return 0

    def bring_again(self, among: Collection[str]) -> None:
        """Never asked for: any version will do."""
        raise ModelMismatch("a rollout server refuses to sample from the weights that it serves")


class Examiner:
    """Asks every question of an exam, always with the same seeds.

    Each rank asks every `world_size`-th question and grades the answers. What one server loses, another samples, or it
    itself when it is back.
    """

    def __init__(
        self,
        exam: Exam,
        service: RolloutService,
        weights: AskedWeights,
        *,
        keep: KeepAnswers,
        mesh: Mesh,
        devices: Devices,
        take: TakeAnswered | None = None,
    ) -> None:
        """
        Args:
            keep: called on the first rank after each evaluation.
            take: called with each question that has all its answers, on the rank that graded them; what has come when
                an evaluation ends early is graded for it. None: nobody wants them before the end.
        """
        self._exam = exam
        self._service = service
        self._weights = weights
        self._keep = keep
        self._mesh = mesh
        self._devices = devices
        self._take = take

    def examine(self, *, done: int, stop: Stop = NEVER) -> AnswerScores:
        """How the student answers after `done` steps. Collective; leaves no trace in what is trained.

        Raises:
            Stopping: `stop` is wanted, before the end.
            StepLost: answers did not come.
            CheckpointError: what was answered cannot be written.
        """
        version = self._weights.bring(done=done)
        self._devices.sample()
        answered = self._answered(version, stop)
        if self._mesh.is_first:
            tell_of_errors(self._exam.questions, answered)
        self._mesh.on_first(lambda: self._keep(done, self._exam.questions, answered))
        return scores_of(answered, ks=self._exam.ks)

    def _answered(self, version: int, stop: Stop) -> list[Answered]:
        """Of every question, in their order. Collective."""
        groups = _Groups(self._exam.prompts, together=self._questions_together())
        sampler = Sampler(
            groups,
            self._service,
            sampling=self._exam.sampling,
            samples_per_prompt=self._exam.samples,
            rank=self._mesh.rank,
            ranks=self._mesh.world_size,
            asks_late_again=True,  # so many questions are asked at once that the last may wait longer than any deadline
        )
        answered: list[Answered] = []
        progress = _Told(len(self._exam.questions))
        num_asked = 0
        try:
            for group in range(len(groups)):
                if stop.is_wanted():
                    raise Stopping
                while num_asked < min(group + _GROUPS_AHEAD, len(groups)):
                    sampler.ask(num_asked, min_weight_version=version)
                    num_asked += 1
                shares = exchange(
                    sampler, group, what="answers to questions", mesh=self._mesh, bring_again=self._bring_again
                )
                answered += self._graded(groups.first(group), sampler.assemble(group, shares), version)
                if self._mesh.is_first:
                    progress.tell(len(answered))
        except (KdmeshError, KeyboardInterrupt):
            if self._take is not None:
                for group, place, rollouts in sampler.arrived():
                    self._answers_to(groups.first(group) + place, rollouts, version)
            raise
        finally:
            sampler.close()
        return answered

    def _questions_together(self) -> int:
        return max(1, _SAMPLES_TOGETHER // self._exam.samples) * self._mesh.world_size

    def _bring_again(self, among: Collection[str]) -> None:
        self._devices.publish()
        self._weights.bring_again(among)
        self._devices.sample()

    def _graded(self, first: int, rollouts: Sequence[Rollout], version: int) -> list[Answered]:
        """The group's answers, from question `first` on; each rank grades those that it asked for. Collective."""
        samples = self._exam.samples
        places = range(self._mesh.rank, len(rollouts) // samples, self._mesh.world_size)
        mine = [
            self._answers_to(first + place, rollouts[place * samples : (place + 1) * samples], version)
            for place in places
        ]
        return sorted((each for share in self._mesh.gather(mine) for each in share), key=lambda each: each.number)

    def _answers_to(self, number: int, rollouts: Sequence[Rollout], version: int) -> Answered:
        for rollout in rollouts:
            if version and rollout.weight_version != version:
                raise ModelMismatch(
                    f"an answer to a question is of weight version {rollout.weight_version}; {version} was asked for"
                )
        question = self._exam.questions[number]
        answered = Answered(number=number, responses=tuple(self._response(rollout, question) for rollout in rollouts))
        if self._take is not None:
            self._take(question, answered)
        return answered

    def _response(self, rollout: Rollout, question: Question) -> Response:
        return graded(
            self._exam.is_right,
            question,
            self._exam.decode(rollout.sequence.labels),
            is_cut_off=rollout.is_cut_off,
            num_tokens=rollout.sequence.num_rows,
        )


class _Groups:
    """An exam's prompts, so many at a time; a Sampler takes each group for a step."""

    def __init__(self, prompts: Sequence[StepPrompt], *, together: int) -> None:
        self._prompts = prompts
        self._together = together

    def __len__(self) -> int:
        return -(-len(self._prompts) // self._together)

    def first(self, group: int) -> int:
        """Number of the group's first question."""
        return group * self._together

    def of_step(self, step: int) -> Sequence[StepPrompt]:
        """The group's prompts, over all ranks."""
        return self._prompts[self.first(step) : self.first(step + 1)]

    def counts(self, step: int) -> Mapping[str, int]:
        """None: an exam is no blend."""
        return {}


class _Told:
    """An event now and then that says how far it is."""

    def __init__(self, questions: int) -> None:
        self._questions = questions
        self._next_s = time.monotonic() + _TELL_EVERY_S

    def tell(self, done: int) -> None:
        """So many questions are answered."""
        if time.monotonic() >= self._next_s and done < self._questions:
            self._next_s = time.monotonic() + _TELL_EVERY_S
            log.info("questions are being answered", extra={"done": done, "questions": self._questions})
