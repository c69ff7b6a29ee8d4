"""Writes the student for others to use while it goes on learning."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import assert_never

from kdmesh.errors import CheckpointError
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.scores import AnswerScores
from kdmesh_trainer.saved_config import checkpoints_in
from kdmesh_trainer.saving.export import HuggingFaceExporter
from kdmesh_trainer.saving.files import settle
from kdmesh_trainer.sections.export_config import BestFigure
from kdmesh_trainer.stats import Scores

log = logging.getLogger(__name__)

_NOTE = "kdmesh.json"  # in each directory: the step, and the figure that made it the best


class ModelSnapshots:
    """OUTPUT/models/step-00000100 and others like it, and OUTPUT/best."""

    def __init__(
        self, exporter: HuggingFaceExporter, output: Path, *, best: BestFigure | None, judged_by: str, mesh: Mesh
    ) -> None:
        """
        Args:
            best: figure that the best student is known by; None: no student is kept for being it.
            judged_by: of all that the figure depends on beside the student, as a digest.
        """
        self._exporter = exporter
        self._output = output
        self._best = best
        self._judged_by = judged_by
        mesh.on_first(lambda: settle(output / "best"))  # perhaps no better one comes, whose writing would do it
        # Without a checkpoint this is another run, or one that does everything again.
        self._is_one_kept = bool(checkpoints_in(output / "checkpoints"))
        self._mesh = mesh

    def write(self, *, done: int) -> None:
        """Write the student as it is now, after `done` steps. Collective. Raises CheckpointError."""
        self._exporter.write(self._output / "models" / f"step-{done:08d}", notes={_NOTE: {"step": done}})

    def judged(self, *, done: int, scores: Scores | None, answers: AnswerScores | None) -> None:
        """Write the student as it is now if it is the best one so far: an evaluation after `done` steps says so.

        A student is better than one before it, not as good. What an earlier attempt at the run kept counts, too, if it
        was judged by the same. Collective.

        Args:
            scores: None where there is no held-out data.
            answers: None where there are no questions.

        Raises:
            CheckpointError: it cannot be written, or what was kept cannot be read.
        """
        if self._best is None:
            return
        value = _value(self._best, scores, answers)
        if self._mesh.on_first(lambda: self._is_better(value)):
            log.info("best student so far", extra={"step": done, self._best: value})
            note = {"step": done, self._best: value, "judged_by": self._judged_by}
            self._exporter.write(self._output / "best", notes={_NOTE: note})
            self._is_one_kept = True

    def _is_better(self, value: float) -> bool:
        known = self._kept_value() if self._is_one_kept else None
        if known is None:
            return value == value  # it is a number
        return value > known if self._best == "accuracy" else value < known

    def _kept_value(self) -> float | None:
        """Of the student that is kept; None: none is, or it was judged by something else."""
        path = self._output / "best" / _NOTE
        try:
            note = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
            is_alike = note.get("judged_by") == self._judged_by
            return float(note[self._best]) if is_alike and self._best in note else None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}, which says how good the best student was, cannot be read: {error}"
            ) from error


def _value(figure: BestFigure, scores: Scores | None, answers: AnswerScores | None) -> float:
    match figure:
        case "accuracy":
            assert answers is not None  # the configuration's, as those below
            return answers.accuracy.mean
        case "kl_nats_per_token":
            assert scores is not None and scores.kl_nats_per_token is not None
            return scores.kl_nats_per_token
        case "cross_entropy_nats_per_token":
            assert scores is not None
            return scores.cross_entropy_nats_per_token
        case _:
            assert_never(figure)
