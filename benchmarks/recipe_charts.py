"""Draws curves over steps as an SVG that can be read on a light and on a dark page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

matplotlib.use("svg")

_SIZE_INCHES = (6.4, 3.4)
_INK, _GRID = "#5b6470", "#c3c9d1"
_COLOURS = ("#7a828c", "#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#c77b18", "#00868b", "#b5487e")
_DASHES = ("-", "--")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def draw(name: str, lines: Sequence[Line], *, title: str, y_label: str) -> str:
    """The curves, with a logarithmic axis of what is measured; the same figures give the same bytes."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.0}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
            axes.plot(line.x, line.y, color=colour, linestyle=dash, label=line.label, linewidth=1.6, marker="o", ms=3)
        axes.set_title(title, color=_INK, loc="left", fontsize=9.5)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(which="both", colors=_INK, length=0)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", drawn.getvalue(), flags=re.DOTALL)
