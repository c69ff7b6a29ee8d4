"""Shows people what the student is asked and what it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.data.encoding.sides import teacher_side
from kdmesh_trainer.saving.files import append_line, keep_lines
from kdmesh_trainer.sources.rollouts import Rollout

log = logging.getLogger(__name__)


class Showcase:
    """Now and then one prompt with all of its responses, as text, in the log and in a file of one object per line."""

    def __init__(
        self,
        path: Path,
        decode: Callable[[Int32Array], str],
        *,
        decode_teacher: Callable[[Int32Array], str],
        every: int,
        samples_per_prompt: int,
    ) -> None:
        """
        Args:
            decode: the student's ids to text, special tokens included.
            decode_teacher: the same of the teacher's.
            every: steps between looks.
        """
        self._path = path
        self._decode = decode
        self._decode_teacher = decode_teacher
        self._every = every
        self._samples_per_prompt = samples_per_prompt

    def start(self, first_step: int) -> None:
        """Drop what an earlier attempt showed from `first_step` on."""
        keep_lines(self._path, lambda line: line["step"] < first_step)

    def show(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """The step's first prompt, if it is this step's turn."""
        if step % self._every:
            return
        shown = rollouts[: self._samples_per_prompt]
        first = shown[0].sequence
        [theirs] = teacher_side([first])
        facts = {"step": step, "prompt": self._decode(_prompt(first))}
        if theirs is not first:
            facts["teacher_prompt"] = self._decode_teacher(_prompt(theirs))
        responses = [
            {
                "text": self._decode(rollout.sequence.token_ids[len(_prompt(rollout.sequence)) :]),
                "is_cut_off": rollout.is_cut_off,
                **_turns(rollout),
                **({} if rollout.verdict is None else {"weight": rollout.verdict.weight}),
            }
            for rollout in shown
        ]
        append_line(self._path, {**facts, "responses": responses})
        for response in responses:
            text = response.pop("text")
            log.info("sample", extra={**facts, "response": text, **response})


def _turns(rollout: Rollout) -> dict[str, object]:
    """What an episode's line has beside others."""
    return {} if rollout.turns is None else {"turns": len(rollout.turns.spans), "ended_by": str(rollout.turns.end)}


def _prompt(sequence: TokenSequence) -> Int32Array:
    ids: Int32Array = sequence.token_ids[: sequence.positions[0] + 1]
    return ids
