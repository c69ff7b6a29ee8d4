"""A server's status as a page that needs nothing else and looks again by itself."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from kdmesh.serving.http.status import SlabStatus, Status, Working
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.words import count, seconds, size

_TEMPLATE = Path(__file__).with_name("status_template.html")
_REFRESH_S = 2
_HEADER = (
    "job",
    "class",
    "weight",
    "tokens/s",
    "share",
    "waiting tokens",
    "wait p50",
    "wait p99",
    "in flight",
    "slab",
    "sessions",
    "refused",
)


def page(status: Status) -> str:
    """HTML; whatever came from a client is escaped."""
    working = status.working
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        refresh_s=_REFRESH_S,
        service=escape(status.service),
        model=escape(working.model if working else ""),
        state=escape(status.state),
        kind="ready" if status.state == "ready" else "closed",
        body="" if working is None else _body(working),
    )


def _body(working: Working) -> str:
    tiles = [
        (f"{count(working.tokens_per_s)} tokens/s", "throughput of the last seconds"),
        (_speed(working), "speed of the engine while it computes"),
        (f"{count(working.waiting_tokens)} tokens", f"wait, in {working.waiting_requests} requests"),
        (str(working.weight_version), "weight version"),
    ]
    parts = ['<section class="tiles">', *(_tile(value, what) for value, what in tiles), "</section>"]
    if working.slab is not None:
        parts += ["<h2>Slab</h2>", _slab(working.slab)]
    return "\n".join([*parts, "<h2>Jobs</h2>", _jobs(working.jobs)])


def _tile(value: str, what: str) -> str:
    return f'<div class="tile"><div class="value">{escape(value)}</div><div class="what">{escape(what)}</div></div>'


def _speed(working: Working) -> str:
    speed = working.engine_tokens_per_s
    return "not measured" if speed is None else f"{count(speed)} tokens/s"


def _slab(slab: SlabStatus) -> str:
    total = sum(slab.slots.values())
    bars = "".join(
        f'<span class="{escape(state)}" style="flex-grow: {number}"></span>' for state, number in slab.slots.items()
    )
    legend = ", ".join(f"{number} {state}" for state, number in slab.slots.items() if number)
    orphans = f", {slab.orphans} more that silent clients keep" if slab.orphans else ""
    text = f"{total} slots of {size(slab.slot_bytes)}: {legend}{orphans}"
    return f'<div class="bar">{bars}</div><p>{escape(text)}</p>'


def _jobs(states: Iterable[JobState]) -> str:
    rows = [_row(state) for state in sorted(states, key=lambda state: -state.share)]
    if not rows:
        return "<p>No job has come yet.</p>"
    header = "".join(f"<th>{name}</th>" for name in _HEADER)
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _row(state: JobState) -> str:
    cells = (
        state.job or "(unnamed)",
        state.terms["priority"],
        f"{state.terms['weight']:g}",
        count(state.tokens_per_s),
        f"{state.share:.0%}",
        count(state.waiting_tokens),
        seconds(state.wait_p50_s),
        seconds(state.wait_p99_s),
        count(state.tokens_in_flight),
        size(state.slab_bytes),
        str(state.sessions),
        ", ".join(f"{number} {reason}" for reason, number in state.refusals.items()) or "0",
    )
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
