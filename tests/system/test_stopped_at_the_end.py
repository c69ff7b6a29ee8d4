"""A run that is asked to stop when no step is left is finished, and its launcher says so."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

from tests.support.trainer_jobs import write_chats
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.training import Job


def test_a_run_that_is_asked_to_stop_after_its_last_step_is_said_to_be_finished(
    materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_chats(data / "train.jsonl", 12, seed=1)
    write_chats(data / "held_out.jsonl", 400, seed=2)  # so that judging takes longer than a signal
    recipe = replace(materials.plain, data=data, objective={"name": "sft"}, is_judged=True)
    finished, stopped = (
        Job(processes, tmp_path / name, recipe, steps=steps, evaluation={})
        for name, steps in (("finished", 2), ("stopped", 10_000))
    )

    process = finished.start_ranks(1)
    process.until(lambda: process.events("checkpoint written"))
    process.signal(signal.SIGTERM)
    process.succeed()
    student = finished.output / "final"
    assert f"The run had done its last step already, and was finished: the student is in {student}." in process.words()
    assert (student / "model.safetensors").is_file()
    assert not any("Stopped" in line for line in process.words())

    other = stopped.start_ranks(1)
    other.until(lambda: other.events("progress"))
    other.signal(signal.SIGTERM)
    other.succeed()
    assert f"Stopped, with a checkpoint in {stopped.output}; the same command continues." in other.words()
    assert not any("finished" in line for line in other.words())
