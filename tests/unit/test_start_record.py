"""Each start of a run has a line of its own, also after one that was cut."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.saving.start_record import record_start


def test_a_line_that_was_never_finished_spoils_no_other(tmp_path: Path) -> None:
    tree = {
        "output": str(tmp_path),
        "student": {"model": "student"},
        "objective": {"name": "sft"},
        "data": {"train": {"format": "chat", "path": "a.jsonl"}},
        "steps": 3,
    }
    cfg, path = TrainerConfig.model_validate(tree), tmp_path / "starts.jsonl"
    for ranks in (1, 2, 3):
        record_start(cfg, {"seed": "0"}, ranks=ranks, device=torch.device("cpu"))
        if ranks == 2:
            path.write_bytes(path.read_bytes()[:-200])  # as on a full disk
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [1, 3]
    assert lines[0]["identity"] == {"seed": "0"}
    assert lines[1]["config"]["steps"] == 3
