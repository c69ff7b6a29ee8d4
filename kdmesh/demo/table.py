"""Prints what a demo found, for a person."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdmesh.demo.outcome import OnPolicyOutcome, Outcome
from kdmesh.demo.record import Evaluation


def print_students(outcome: Outcome) -> None:
    """Both students beside the teacher."""
    _print(outcome.teacher.evaluations[-1], outcome.rows, outcome.sentence(), outcome.report)


def print_on_policy(outcome: OnPolicyOutcome) -> None:
    """The student before and after it learnt from its own answers."""
    rows = [("warmed-up", outcome.before), ("on-policy", outcome.after)]
    _print(outcome.teacher.evaluations[-1], rows, outcome.sentence(), outcome.report)


def _print(teacher: Evaluation, rows: Sequence[tuple[str, Evaluation]], sentence: str, report: Path) -> None:
    table = Table(title="On held-out functions", title_justify="left", title_style="bold")
    for heading in ("model", "KL(teacher || model)", "perplexity", "same first choice"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    table.add_row("teacher", "", f"{teacher.perplexity:,.1f}", "")
    for name, evaluation in rows:
        style = "bold" if evaluation is rows[-1][1] else None
        kl, agreement = evaluation.kl_nats_per_token, evaluation.top1_agreement
        assert kl is not None
        assert agreement is not None
        table.add_row(name, f"{kl:.4f}", f"{evaluation.perplexity:,.1f}", f"{agreement:.1%}", style=style)
    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(table)
    console.print(sentence)
    console.print(f"Report: {report}")
