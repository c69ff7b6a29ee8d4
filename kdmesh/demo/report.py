"""Writes the demo's outcome as one page that needs nothing else."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

from kdmesh.allowance import num_cores
from kdmesh.demo.charts import Chart, draw_all
from kdmesh.demo.corpus import Corpus
from kdmesh.demo.models import Architecture
from kdmesh.demo.outcome import Outcome
from kdmesh.demo.plan import Plan
from kdmesh.demo.record import Evaluation, teacher_wait_fraction, tokens_per_second

_TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(outcome: Outcome, plan: Plan, corpus: Corpus, *, config: Path) -> None:
    """Write `outcome.report`, all of it or nothing.

    Args:
        config: the distilled student's configuration file, shown on the page.
    """
    write_page(
        outcome.report,
        Page(
            sentence=outcome.sentence(),
            story=_story(outcome, plan, corpus),
            tiles=_tiles(outcome),
            models=[("teacher", outcome.teacher.evaluations[-1]), *outcome.rows],
            charts=draw_all(outcome),
            seconds=outcome.seconds,
        ),
        corpus,
        config=config,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What differs between the pages of two demos, as plain text."""

    sentence: str
    story: str
    tiles: Sequence[tuple[str, str]]  # value, what it is
    models: Sequence[tuple[str, Evaluation]]  # by name
    charts: Sequence[Chart]
    seconds: Mapping[str, float]


def write_page(path: Path, page: Page, corpus: Corpus, *, config: Path) -> None:
    """Write a page, all of it or nothing; `config` is shown on it."""
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        sentence=escape(page.sentence),
        story=escape(page.story),
        tiles="".join(_tile(value, what) for value, what in page.tiles),
        rows="".join(_row(name, evaluation) for name, evaluation in page.models),
        charts="".join(
            f'<figure class="card"><figcaption>{escape(chart.title)}</figcaption>{chart.svg}</figure>'
            for chart in page.charts
        ),
        example=_example(corpus),
        phases="".join(
            f"<tr><td>{escape(name)}</td><td>{seconds:.0f}</td></tr>" for name, seconds in page.seconds.items()
        ),
        config=escape(config.read_text(encoding="utf-8")),
        made_with=escape(_made_with()),
    )
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _story(outcome: Outcome, plan: Plan, corpus: Corpus) -> str:
    teacher = size_in_words(plan.teacher, plan)
    student = size_in_words(plan.student, plan)
    return (
        f"A teacher of {teacher} parameters learnt to write docstrings from {len(corpus.train):,} functions of "
        f"Python {platform.python_version()}'s standard library. Two students of {student} then started from the "
        f"same random weights and saw the same {outcome.kd.done} batches: one learnt the docstrings themselves (SFT), "
        "one the distribution that the teacher's server gave for each of their tokens (KD). They are judged on "
        f"{plan.held_out_sequences} functions of modules that nobody was trained on."
    )


def size_in_words(architecture: Architecture, plan: Plan) -> str:
    """The parameters of a model."""
    number = architecture.num_parameters(plan.vocabulary_size)
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number / 1e3:.0f} thousand"


def _tiles(outcome: Outcome) -> list[tuple[str, str]]:
    (_, _), (_, sft), (_, kd) = outcome.rows
    return [
        (f"{kd.kl_nats_per_token:.3f}", f"nats from the teacher after KD; {sft.kl_nats_per_token:.3f} after SFT"),
        (f"{tokens_per_second(outcome.kd.steps):,.0f}", "tokens per second while distilling, teacher included"),
        (f"{teacher_wait_fraction(outcome.kd.steps):.0%}", "of that time a rank waited for the teacher"),
        (outcome.kd.steps[-1].door or "none", "is the door that hidden states came through"),
    ]


def _tile(value: str, what: str) -> str:
    return (
        f'<div class="card tile"><div class="value">{escape(value)}</div><div class="what">{escape(what)}</div></div>'
    )


def _row(name: str, evaluation: Evaluation) -> str:
    kl = "" if evaluation.kl_nats_per_token is None else f"{evaluation.kl_nats_per_token:.4f}"
    agreement = "" if evaluation.top1_agreement is None else f"{evaluation.top1_agreement:.1%}"
    cells = "".join(f"<td>{cell}</td>" for cell in (kl, f"{evaluation.perplexity:,.1f}", agreement))
    return f'<tr><td class="{name.lower()}">{escape(name)}</td>{cells}</tr>'


def _example(corpus: Corpus) -> str:
    shown = corpus.held_out[0]
    sides = ((f"user, from {shown.module}", shown.source), ("assistant", shown.docstring))
    return "".join(
        f'<div class="card"><h3>{escape(title)}</h3><pre>{escape(text)}</pre></div>' for title, text in sides
    )


def _made_with() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("kdmesh", "torch", "transformers"))
    return f"{packages}, Python {platform.python_version()}, {platform.system()} on {num_cores()} cores"
