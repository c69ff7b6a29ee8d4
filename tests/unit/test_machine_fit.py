"""A run that this machine's ranks cannot do is refused before a server loads a model for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdmesh import config
from kdmesh.errors import ConfigError
from kdmesh.launch import local
from kdmesh.launch.machine_fit import refuse_unfit_machine
from kdmesh_trainer.config import TrainerConfig


def loaded(directory: Path, *overrides: str) -> TrainerConfig:
    (directory / "student").mkdir(exist_ok=True)
    (directory / "student" / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 4}}))
    path = directory / "train.yaml"
    path.write_text(
        f"output: run\nsteps: 10\nstudent: {{model: {directory / 'student'}}}\nobjective: {{name: sft}}\n"
        "data: {train: {format: chat, path: train.jsonl}}\n"
    )
    return config.load(TrainerConfig, path, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.shard_ranks=2"], "parallel.shard_ranks is 2 and the job has 3 ranks"),
        (["parallel.context=2"], "parallel.context is 2 and the job has 3 ranks"),
        (["student.device=cuda"], "student.device is cuda, but there is no GPU"),
        (["student.liger_kernels=true"], "student.liger_kernels needs a GPU"),
        (
            ["parallel.context=3", "parallel.context_exchange=heads"],
            "parallel.context is 3 and .* has 4 attention heads; it must divide them",
        ),
    ],
)
def test_what_the_ranks_cannot_do_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.setattr(local, "may_have_gpu", lambda: False)
    with pytest.raises(ConfigError, match=words):
        refuse_unfit_machine(loaded(tmp_path, *overrides), ranks=3)


def test_what_they_can_do_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "may_have_gpu", lambda: True)
    for overrides in (["student.device=cuda"], ["parallel.context=3"], ["student.liger_kernels=true"]):
        refuse_unfit_machine(loaded(tmp_path, *overrides), ranks=3)
    cfg = loaded(tmp_path, "parallel.context=3", "parallel.context_exchange=heads")
    (tmp_path / "student" / "config.json").write_text("{}")  # a model that counts them in words of its own
    refuse_unfit_machine(cfg, ranks=3)


def test_shards_that_no_number_of_such_machines_holds_well_are_a_bad_configuration(tmp_path: Path) -> None:
    for ranks, shards in ((4, 2), (4, 8), (8, 8)):
        loaded(tmp_path, f"ranks={ranks}", f"parallel.shard_ranks={shards}")
    with pytest.raises(ConfigError, match=r"parallel.shard_ranks \(3\) must divide ranks \(4\)"):
        loaded(tmp_path, "ranks=4", "parallel.shard_ranks=3")
