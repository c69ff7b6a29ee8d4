"""Writes the outcome of the on-policy demo as one page that needs nothing else."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from kdmesh.demo.charts import Chart, Curve, draw
from kdmesh.demo.corpus import Corpus
from kdmesh.demo.outcome import OnPolicyOutcome
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import SampledStep, teacher_wait_fraction
from kdmesh.demo.report import Page, size_in_words, write_page

_SMOOTHED_STEPS = 8


def write_report(outcome: OnPolicyOutcome, plan: Plan, corpus: Corpus, *, config: Path) -> None:
    """Write `outcome.report`, all of it or nothing.

    Args:
        config: the student's configuration file, shown on the page.
    """
    write_page(
        outcome.report,
        Page(
            sentence=outcome.sentence(),
            story=_story(outcome, plan, corpus),
            tiles=_tiles(outcome),
            models=[
                ("teacher", outcome.teacher.evaluations[-1]),
                ("warmed-up", outcome.before),
                ("on-policy", outcome.after),
            ],
            charts=_charts(outcome),
            seconds=outcome.seconds,
        ),
        corpus,
        config=config,
    )


def _story(outcome: OnPolicyOutcome, plan: Plan, corpus: Corpus) -> str:
    sampled = plan.student_on_policy
    return (
        f"A teacher of {size_in_words(plan.teacher, plan)} parameters learnt to write docstrings from "
        f"{len(corpus.train):,} functions of Python {platform.python_version()}'s standard library. A student of "
        f"{size_in_words(plan.student, plan)} saw {plan.student_warm_up.steps} batches of them. Then it answered by "
        f"itself: in each of {outcome.run.done} steps a rollout server sampled {sampled.samples_per_prompt} answers "
        f"to {sampled.prompts} functions, the teacher's server gave its distribution for each of their tokens, the "
        "trainer brought the student nearer to it, and the rollout server got the new weights. Samples began on "
        f"weights at most {sampled.max_staleness} update old. The student is judged on {plan.held_out_sequences} "
        "functions of modules that nobody was trained on, and on the docstrings that these have."
    )


def _tiles(outcome: OnPolicyOutcome) -> list[tuple[str, str]]:
    last = outcome.sampled[-1]
    return [
        (
            f"{outcome.after.kl_nats_per_token:.3f}",
            f"nats from the teacher on held-out docstrings; {outcome.before.kl_nats_per_token:.3f} before",
        ),
        (f"{last.response_tokens_mean:.0f}", f"tokens in an answer; {last.cut_off_fraction:.0%} were cut off"),
        (f"{outcome.sampling_wait_fraction:.0%}", "of a step was spent waiting for samples"),
        (f"{teacher_wait_fraction(outcome.run.steps):.0%}", "was spent waiting for the teacher"),
    ]


def _charts(outcome: OnPolicyOutcome) -> list[Chart]:
    steps = outcome.sampled
    evaluations = [(e.step, e.kl_nats_per_token) for e in outcome.run.evaluations if e.kl_nats_per_token is not None]
    held_out = Curve(
        label="held out", style="kd", x=[x for x, _ in evaluations], y=[y for _, y in evaluations], is_marked=True
    )
    own = _curve("own answers", "kd", steps, lambda step: step.divergence_nats_per_token)
    return [
        Chart(
            name="kl",
            title="KL(teacher ‖ student) on held-out docstrings, nats per token",
            svg=draw("kl", [held_out]),
        ),
        Chart(name="own", title="KL(student ‖ teacher) on its own answers, nats per token", svg=draw("own", [own])),
        Chart(
            name="entropy",
            title="Entropy on the student's answers, nats per token",
            svg=draw(
                "entropy",
                [
                    _curve("student", "kd", steps, lambda step: step.student_entropy_nats),
                    _curve("teacher", "teacher", steps, lambda step: step.teacher_entropy_nats),
                ],
            ),
        ),
        Chart(
            name="length",
            title="Tokens in an answer",
            svg=draw(
                "length", [_curve("mean", "kd", steps, lambda step: step.response_tokens_mean)], starts_at_zero=True
            ),
        ),
        Chart(
            name="drift",
            title="KL(sampler ‖ student), from weights that are an update old, nats per token",
            svg=draw("drift", [_curve("k3", "sft", steps, lambda step: step.sampler_kl_k3_nats)], starts_at_zero=True),
        ),
        Chart(
            name="phases",
            title="Seconds of a step",
            svg=draw(
                "phases",
                [
                    _curve("sampling", "sft", steps, lambda step: step.sampling_wait_s),
                    _curve("teacher", "teacher", steps, lambda step: step.teacher_wait_s),
                    _curve("update", "kd", steps, lambda step: step.phase_s["update"] - step.teacher_wait_s),
                    _curve("publish", "soft", steps, lambda step: step.phase_s["publish"]),
                ],
                starts_at_zero=True,
            ),
        ),
    ]


def _curve(label: str, style: str, steps: Sequence[SampledStep], value: Callable[[SampledStep], float]) -> Curve:
    """Each point is the mean of the last few steps."""
    sums = [0.0, *accumulate(value(step) for step in steps)]
    begins = [max(0, end - _SMOOTHED_STEPS) for end in range(1, len(sums))]
    means = [(sums[end] - sums[begin]) / (end - begin) for end, begin in enumerate(begins, start=1)]
    return Curve(label=label, style=style, x=[step.step + 1 for step in steps], y=means)
