"""Draws the demo's curves as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kdmesh.demo.outcome import Outcome
from kdmesh.demo.record import Record

matplotlib.use("svg")

# Stand-ins that the page's style sheet replaces, so that one picture serves light and dark.
_STYLES = {
    "ink": "#a1b2c1",
    "soft": "#a1b2c2",
    "grid": "#a1b2c3",
    "sft": "#a1b2c4",
    "kd": "#a1b2c5",
    "teacher": "#a1b2c6",
}
_SIZE_INCHES = (5.2, 3.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a chart."""

    label: str
    style: str  # a name of _STYLES
    x: Sequence[float]
    y: Sequence[float]
    is_marked: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture, and what stands above it."""

    name: str
    title: str
    svg: str


def draw_all(outcome: Outcome) -> list[Chart]:
    """Every chart of the report, in its order."""
    sft, kd = outcome.sft, outcome.kd
    teacher_perplexity = outcome.teacher.evaluations[-1].perplexity
    span = (0, kd.done)
    return [
        Chart(
            name="kl",
            title="KL(teacher ‖ student) on held-out functions, nats per token",
            svg=draw("kl", [_kl("SFT", "sft", sft), _kl("KD", "kd", kd)], is_log=True),
        ),
        Chart(
            name="perplexity",
            title="Perplexity of the held-out docstrings",
            svg=draw(
                "perplexity",
                [
                    _perplexity("SFT", "sft", sft),
                    _perplexity("KD", "kd", kd),
                    Curve(label="teacher", style="teacher", x=span, y=(teacher_perplexity,) * 2, is_dashed=True),
                ],
                is_log=True,
            ),
        ),
        Chart(
            name="loss",
            title="Cross-entropy of the training docstrings, nats per token",
            svg=draw("loss", [_cross_entropy("SFT", "sft", sft), _cross_entropy("KD", "kd", kd)]),
        ),
        Chart(
            name="speed",
            title="Tokens per second while training",
            svg=draw("speed", [_speed("SFT", "sft", sft), _speed("KD", "kd", kd)], starts_at_zero=True),
        ),
    ]


def _kl(label: str, style: str, record: Record) -> Curve:
    points = [(e.step, e.kl_nats_per_token) for e in record.evaluations if e.kl_nats_per_token is not None]
    return Curve(label=label, style=style, x=[x for x, _ in points], y=[y for _, y in points], is_marked=True)


def _perplexity(label: str, style: str, record: Record) -> Curve:
    evaluations = record.evaluations
    return Curve(
        label=label, style=style, x=[e.step for e in evaluations], y=[e.perplexity for e in evaluations], is_marked=True
    )


def _cross_entropy(label: str, style: str, record: Record) -> Curve:
    points = [(s.step + 1, s.cross_entropy_nats_per_token) for s in record.steps if s.cross_entropy_nats_per_token]
    return Curve(label=label, style=style, x=[x for x, _ in points], y=[y for _, y in points])


def _speed(label: str, style: str, record: Record) -> Curve:
    steps = record.steps
    return Curve(label=label, style=style, x=[s.step + 1 for s in steps], y=[s.num_tokens / s.step_s for s in steps])


def draw(name: str, curves: Sequence[Curve], *, is_log: bool = False, starts_at_zero: bool = False) -> str:
    """The curves as SVG, over steps."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.0}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(
                curve.x,
                curve.y,
                color=_STYLES[curve.style],
                label=curve.label,
                linewidth=1.8,
                linestyle="--" if curve.is_dashed else "-",
                marker="o" if curve.is_marked else None,
                markersize=3.5,
            )
        _scale(axes, is_log=is_log, starts_at_zero=starts_at_zero)
        axes.set_xlabel("step", color=_STYLES["soft"])
        axes.tick_params(which="both", colors=_STYLES["soft"], length=0)
        axes.grid(color=_STYLES["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.legend(
            frameon=False, labelcolor=_STYLES["ink"], ncols=len(curves), loc="lower left", bbox_to_anchor=(0, 1)
        )
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _embeddable(name, drawn.getvalue())


def _scale(axes: Axes, *, is_log: bool, starts_at_zero: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    if starts_at_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _embeddable(name: str, svg: str) -> str:
    """Without the XML header, with ids that no other picture has, and colours that the page sets."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for style, colour in _STYLES.items():
        svg = svg.replace(colour, f"var(--{style})")
    return svg
