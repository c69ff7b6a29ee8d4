"""The numbers of a run that Prometheus reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.stats import Scores, StepStats

JOB = "kdmesh_job"  # as in the metrics of the servers
_NAMESPACE = "kdmesh_trainer"
_SECONDS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_FIGURES = {
    "loss_nats_per_token": "What the last step minimised.",
    "divergence_nats_per_token": "From the teacher, in the last step.",
    "cross_entropy_nats_per_token": "Of the data's tokens, in the last step, where the objective computes it.",
    "top1_agreement": "Part of the last step's loss tokens where student and teacher prefer the same token.",
    "layer_distance": "Between layers of student and teacher that are compared, in the last step.",
    "topk_overlap": "Part of the teacher's likeliest tokens that are among the student's.",
    "gradient_norm": "Before clipping.",
    "learning_rate": "Of the last step.",
    "teacher_age_steps": "Steps since the teacher got the student's weights.",
    "response_tokens_mean": "Of the last step's samples.",
    "cut_off_fraction": "Part of the last step's samples that ended at a limit of length.",
    "sample_weight_mean": "What source.judge gave the last step's samples, on average.",
    "left_out_fraction": "Part of the last step's samples to which source.judge gave weight 0.",
    "right_fraction": "Part of the last step's samples that source.judge found right.",
    "judge_errors": "Samples of the last step on which source.judge failed.",
    "episode_turns_mean": "Turns of the student in the last step's episodes, on average.",
    "environment_fraction": "Part of the tokens of the last step's episodes that source.environment has said.",
    "ended_by_environment_fraction": "Part of the last step's episodes that source.environment has ended.",
    "ended_by_turns_fraction": "Part of the last step's episodes that ended at source.environment.max_turns.",
    "ended_by_length_fraction": "Part of the last step's episodes that ended at a limit of length.",
    "ended_by_template_fraction": "Part of the last step's episodes whose turns the chat template writes otherwise.",
    "staleness_steps_max": "Most updates of the student between a sample's first token and its use, in the last step.",
    "sampler_kl_k1_nats": "Estimate of KL(sampler || student) over the last step's samples.",
    "aligned_fraction": "Part of the last step's response tokens that are compared with another tokenizer's.",
    "student_entropy_nats": "Of the student's distribution over the last step's samples.",
}
_SCORES = {
    "kl_nats_per_token": "KL(teacher || student) on held-out data.",
    "cross_entropy_nats_per_token": "On held-out data.",
    "top1_agreement": "Part of held-out tokens where student and teacher prefer the same token.",
}
_ANSWERS = {
    "accuracy": "Part of the answers to questions that are right.",
    "accuracy_standard_error": "Of the part of the answers that are right.",
    "cut_off_fraction": "Part of the answers to questions that ended at a limit of length.",
    "response_tokens_mean": "Of the answers to questions.",
    "grader_errors": "Answers of the last evaluation on which the grader failed.",
}


class Metrics:
    """Counters of this process and gauges of the last step, all with the job's name."""

    def __init__(self, job: str, *, steps: int | None = None) -> None:
        """`steps` of the run, where they are known before it begins."""
        self.registry = CollectorRegistry()
        self.label_names: dict[str, tuple[str, ...]] = {}
        """Of each, by its whole name."""

        self._job = job
        self._wanted = self._gauge("steps_wanted", "Optimizer steps that the run is to have.")
        if steps is not None:
            self._wanted.labels(job).set(steps)
        self._step = self._gauge("step", "Optimizer steps done, those before a restart too.")
        self._last_step = self._gauge(
            "last_step_timestamp_seconds", "When the last step ended, or the run began, in Unix time."
        )
        self._steps = self._counter("steps", "Optimizer steps done by this process.")
        self._tokens = self._counter("tokens", "Tokens trained on.")
        self._loss_tokens = self._counter("loss_tokens", "Tokens that carried loss.")
        self._step_seconds = Histogram(
            "step_seconds", "Duration of a step.", [JOB], namespace=_NAMESPACE, registry=self.registry, buckets=_SECONDS
        )
        self.label_names[f"{_NAMESPACE}_step_seconds"] = (JOB,)
        self._phase_seconds = self._counter("phase_seconds", "Time in each phase of the loop.", "phase")
        self._bound_seconds = self._counter(
            "bound_seconds", "Time of steps, by what it went to: waiting for teacher or samples, or working.", "by"
        )
        self._teacher_wait = self._counter(
            "teacher_wait_seconds", "Waiting for the rows of each of several teachers.", "teacher"
        )
        self._dataset_sequences = self._counter(
            "dataset_sequences", "Sequences trained on of each dataset of a blend.", "dataset"
        )
        self._figures = {name: self._gauge(name, text) for name, text in _FIGURES.items()}
        self._scores = {name: self._gauge(f"held_out_{name}", text) for name, text in _SCORES.items()}
        self._dataset_scores = {
            name: self._gauge(
                f"held_out_dataset_{name}", f"As held_out_{name}, of each of several datasets.", "dataset"
            )
            for name in _SCORES
        }
        self._answers = {name: self._gauge(f"questions_{name}", text) for name, text in _ANSWERS.items()}
        self._pass_at = self._gauge("questions_pass_at", "Part of questions of which one of k answers is right.", "k")
        self._pass_at_error = self._gauge("questions_pass_at_standard_error", "Of that part of the questions.", "k")
        self._imbalance = self._gauge("teacher_imbalance", "Most over mean of the tokens sent to each teacher lately.")
        self._door = self._gauge("door", "Always 1; says through which doors rows come now.", "door")
        self._not_finite = self._counter("not_finite_steps", "Steps whose loss or weights were not finite.")
        self._not_finite.labels(job)
        self._skipped = self._counter("skipped_steps", "Steps without a sample that had weight: nothing was learnt.")
        self._skipped.labels(job)

    def started(self, first_step: int, steps: int) -> None:
        """The run begins, or goes on, after `first_step` of `steps`: one that hangs in its first step shows, too."""
        self._wanted.labels(self._job).set(steps)
        self._step.labels(self._job).set(first_step)
        self._last_step.labels(self._job).set(time.time())

    def step_done(
        self, done: int, stats: StepStats, *, phase_s: Mapping[str, float], bound_s: Mapping[str, float], step_s: float
    ) -> None:
        """A step is done, `done` in all.

        Args:
            phase_s: of every phase since the last step.
            bound_s: the step's own seconds by what they went to.
        """
        job = self._job
        self._step.labels(job).set(done)
        self._last_step.labels(job).set(time.time())
        self._steps.labels(job).inc()
        self._skipped.labels(job).inc(stats.loss_nats_per_token is None)
        self._tokens.labels(job).inc(stats.num_tokens)
        self._loss_tokens.labels(job).inc(stats.num_loss_tokens)
        self._step_seconds.labels(job).observe(step_s)
        for phase, seconds in phase_s.items():
            self._phase_seconds.labels(job, phase).inc(seconds)
        for by, seconds in bound_s.items():
            self._bound_seconds.labels(job, by).inc(max(seconds, 0.0))
        for name, teacher in stats.teachers.items():
            self._teacher_wait.labels(job, name).inc(teacher.wait_s)
        for name, count in stats.datasets.items():
            self._dataset_sequences.labels(job, name).inc(count)
        known = {name: value for name, value in stats.figures().items() if name in self._figures and value is not None}
        for name, value in known.items():
            self._figures[name].labels(job).set(value)

    def rows_came(self, doors: Set[str], imbalance: float | None) -> None:
        """Through which doors, and how unevenly the teachers were asked."""
        self._door.clear()
        for door in doors:
            self._door.labels(self._job, door).set(1)
        if imbalance is not None:
            self._imbalance.labels(self._job).set(imbalance)

    def evaluated(self, scores: Scores, seconds: float) -> None:
        """The student has been judged on held-out data, which took so long."""
        self._phase_seconds.labels(self._job, "evaluate").inc(seconds)
        for dataset, each in {"": scores, **scores.datasets}.items():
            gauges, labels = (self._dataset_scores, (dataset,)) if dataset else (self._scores, ())
            for name, value in each.figures().items():
                if name in gauges and value is not None:
                    gauges[name].labels(self._job, *labels).set(value)

    def examined(self, scores: AnswerScores, seconds: float) -> None:
        """The student has answered questions, which took so long."""
        self._phase_seconds.labels(self._job, "examine").inc(seconds)
        for name, value in scores.figures().items():
            if name in self._answers and value is not None:
                self._answers[name].labels(self._job).set(value)
        for k, estimate in scores.pass_at.items():
            self._pass_at.labels(self._job, str(k)).set(estimate.mean)
            if estimate.standard_error is not None:
                self._pass_at_error.labels(self._job, str(k)).set(estimate.standard_error)

    def not_finite(self) -> None:
        """A step's loss was not."""
        self._not_finite.labels(self._job).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self.label_names[f"{_NAMESPACE}_{name}"] = (JOB, *labels)
        return Counter(name, text, [JOB, *labels], namespace=_NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self.label_names[f"{_NAMESPACE}_{name}"] = (JOB, *labels)
        return Gauge(name, text, [JOB, *labels], namespace=_NAMESPACE, registry=self.registry)
