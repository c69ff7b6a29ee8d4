"""Writes a chat dataset of a served model's own answers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kdmesh.answering.answer_report import Report
from kdmesh.answering.kept_answers import KeptAnswers, kept_answers
from kdmesh.answering.prompt_rows import Asked, Prompts
from kdmesh.answering.source import AnswerSource, Plan, Servers
from kdmesh.counting import Pace, counted, told
from kdmesh.errors import KdmeshError
from kdmesh.launch.local import Stopped
from kdmesh.outputs import refuse_own_input, tell


def generate(servers: Servers, prompts: Path, output: Path, plan: Plan, *, image_root: Path | None = None) -> Report:
    """Write one row of `messages` for each answer, in the order of the prompts; blocks until all are written.

    Every prompt is read and checked before the first is sent. `output` appears when it is whole; until then the
    answers are kept beside it (see kept_answers.py), and the same call goes on with those that are missing.

    Args:
        servers: all of one model.
        prompts: see Prompts.
        output: JSONL file to write.
        plan: how answers are drawn.
        image_root: directory that paths of images are relative to; None: that of `prompts`.

    Raises:
        ConfigError: the servers cannot be asked so, `output` is `prompts` or cannot be written, or the answers kept
            beside it are to something else.
        DataError: a prompt cannot be used.
        RpcError: the servers do not answer, are others than they should be, or refuse a prompt.
        KdmeshError: there is no answer to write.
        Stopped: Ctrl-C, once the first prompt was sent.
    """
    refuse_own_input(output, {"--prompts": prompts})
    root = image_root or prompts.parent
    rows = Prompts(prompts)
    with ExitStack() as stack:
        kept = stack.enter_context(kept_answers(output))
        source = stack.enter_context(servers.opened(plan, root))
        _check(rows, source)
        kept.resume(
            {
                "prompts": rows.digest,
                "image_root": str(root),
                "samples": plan.samples,
                "seed": plan.seed,
                "keep_cut_off": plan.keeps_cut_off,
                **source.facts,
            }
        )
        with _kept_told(kept), counted("prompts", elsewhere=told("prompts answered")) as show:
            pace = Pace(done=kept.prompts, total=len(rows))
            show(kept.prompts, len(rows), None)
            for asked, answers in source.answers(rows.rows(source.images, without=kept)):
                kept.add(asked.number, [_answered(asked, turn) for turn in answers.turns], answers.counts)
                show(kept.prompts, len(rows), pace.left_s(kept.prompts))
        report = Report(prompts=kept.prompts, written=kept.written, counts=kept.counts)
        if not report.written:
            kept.is_needed = False
            raise KdmeshError(f"{output} is not written: {report.why_nothing(keeps_cut_off=plan.keeps_cut_off)}")
        kept.publish(output)
        return report


def _check(rows: Prompts, source: AnswerSource) -> None:
    """Raises DataError when a prompt cannot be used: before any is answered, not after hours."""
    with counted("prompts read", elsewhere=told("prompts read")) as show:
        pace = Pace(done=0, total=len(rows))
        for number, row in enumerate(rows.rows(source.images), start=1):
            source.check(row)
            show(number, len(rows), pace.left_s(number))


@contextmanager
def _kept_told(kept: KeptAnswers) -> Iterator[None]:
    """Say what is gone on with, and what is kept when it fails."""
    if kept.damaged:
        lines = "1 line" if kept.damaged == 1 else f"{kept.damaged:,} lines"
        tell(f"Damaged in {kept.path}: {lines} of answers, to prompts that are asked again.")
    if kept.prompts:
        tell(f"Going on behind {kept.prompts:,} prompts, whose answers are in {kept.path}.")
    try:
        yield
    except (KdmeshError, KeyboardInterrupt) as error:
        if kept.prompts:
            tell(
                f"The answers to {kept.prompts:,} prompts are kept in {kept.path}; the same command goes on from there."
            )
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(error.signum if isinstance(error, Stopped) else signal.SIGINT) from None
        raise


def _answered(asked: Asked, turn: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an answer."""
    return {"messages": [*asked.messages, turn], **asked.columns}
