"""Checkpoints that cannot be written, cannot be read, or are not this run's."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from kdmesh.errors import CheckpointError
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.saving import checkpoint
from kdmesh_trainer.saving.checkpoint import CheckpointDirectory
from kdmesh_trainer.saving.seal import write_seal
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from tests.support.full_disk import files_limited_to
from tests.support.tiny_models import TinyModels
from tests.support.trainer_parts import LocalTeacher, build_stepper, build_student, random_sequences, step_batch

IDENTITY = {"student": "a", "objective": "distill", "seed": "0"}
Usage = namedtuple("Usage", "total used free")


class Run:
    """A student that can be trained and saved."""

    def __init__(self, path: Path, mesh: Mesh, tiny_models: TinyModels, *, has_idle: bool = False) -> None:
        """
        Args:
            has_idle: the student has a parameter that no gradient comes to.
        """
        model = tiny_models.path("qwen3", seed=1)
        self._teacher = LocalTeacher(model)
        self.student = build_student(model, mesh, vocabulary_size=310, compute_dtype=torch.float32)
        self.idle = nn.Parameter(distribute_tensor(torch.ones(3), mesh.device_mesh))
        if has_idle:
            self.student.register_parameter("idle", self.idle)
        self._stepper = build_stepper(self.student, self._teacher, mesh, config=OptimizerConfig(), steps=100)
        self.optimizer = self._stepper.optimizer
        self._sequences = random_sequences(2, seed=1, vocabulary_size=310)
        self._mesh = mesh
        self.path = path

    def directory(
        self, *, keep: int = 2, steps: int = 100, due_after_s: float | None = None, **identity: str
    ) -> CheckpointDirectory:
        return CheckpointDirectory(
            self.path,
            self.student,
            self.optimizer,
            identity=IDENTITY | identity,
            steps=steps,
            keep=keep,
            due_after_s=due_after_s,
            mesh=self._mesh,
        )

    def train(self, *, steps: int) -> None:
        for step in range(steps):
            self._stepper.update(step_batch(self._sequences, [[0, 1]], self._teacher, step=step))

    def save(self, next_step: int) -> None:
        self.directory().save(next_step=next_step)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


@pytest.fixture
def run(tmp_path: Path, tiny_models: TinyModels) -> Iterator[Run]:
    with joined("cpu", longest_wait_s=10) as mesh:
        run = Run(tmp_path / "checkpoints", mesh, tiny_models)
        run.train(steps=1)
        yield run


def test_without_a_checkpoint_a_run_starts_at_step_0(run: Run) -> None:
    assert run.directory().restore() == 0


def test_a_parameter_without_a_gradient_stops_nothing(tmp_path: Path, tiny_models: TinyModels) -> None:
    with joined("cpu", longest_wait_s=10) as mesh:
        run = Run(tmp_path / "checkpoints", mesh, tiny_models, has_idle=True)
        run.train(steps=2)
        run.save(2)
        again = Run(tmp_path / "checkpoints", mesh, tiny_models, has_idle=True)
        assert again.directory().restore() == 2
        for one in (run, again):
            one.train(steps=2)
            assert one.idle not in one.optimizer.state
        weights = [dict(one.student.named_parameters()) for one in (run, again)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_is_due_so_long_after_the_start_or_the_last_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now_s))
    directory, never = run.directory(due_after_s=60), run.directory()
    for since_s, is_due in ((59.0, False), (60.0, True)):
        now_s = 100.0 + since_s
        assert directory.is_due() is is_due
    directory.save(next_step=1)
    assert not directory.is_due()
    now_s = 220.0
    assert directory.is_due() and not never.is_due()


def test_only_the_newest_are_kept(run: Run) -> None:
    for next_step in (3, 6, 9, 12):
        run.save(next_step)
    assert run.names() == ["step-00000009", "step-00000012"]
    assert run.directory().restore() == 12


def test_a_write_that_was_interrupted_is_cleaned_at_the_next_start(run: Run) -> None:
    run.save(3)
    (run.path / "writing-00000006").mkdir()
    (run.path / "writing-00000006" / "__0_0.distcp").write_bytes(b"half")
    (run.path / "removing-step-00000001").mkdir()
    assert run.directory().restore() == 3
    assert run.names() == ["step-00000003"]


def test_a_removal_that_a_kill_prevented_is_made_up_for_at_the_next_start(run: Run) -> None:
    for next_step in (3, 6, 9):
        run.directory(keep=3).save(next_step=next_step)
    assert run.directory(keep=2).restore() == 9  # of a last step, after which nothing is saved any more
    assert run.names() == ["step-00000006", "step-00000009"]


def test_a_copy_that_somebody_put_beside_them_is_left_alone_and_is_none_of_them(run: Run) -> None:
    run.save(3)
    shutil.copytree(run.path / "step-00000003", run.path / "step-00000003-before-the-weekend")
    assert run.directory().restore() == 3
    run.directory(keep=1).save(next_step=6)
    assert run.names() == ["step-00000003-before-the-weekend", "step-00000006"]


def test_no_space_is_found_before_anything_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 4567, 4567))
    with pytest.raises(CheckpointError, match="not enough space") as refused:
        run.save(6)
    assert str(run.path / "writing-00000006") in str(refused.value)
    assert "4567 bytes free" in str(refused.value)
    needed = int(str(refused.value).partition("(")[2].split()[0])
    on_disk = sum(file.stat().st_size for file in (run.path / "step-00000003").iterdir())
    assert on_disk <= needed <= on_disk + 2**20
    assert run.names() == ["step-00000003"]
    assert run.directory().restore() == 3


@pytest.mark.parametrize("limit_bytes", [10_000, 100])
def test_a_disk_that_fills_up_meanwhile_leaves_no_half_checkpoint(run: Run, limit_bytes: int) -> None:
    run.save(3)
    with (
        files_limited_to(limit_bytes),
        pytest.raises(CheckpointError, match=r"was not written: .*bytes needed") as told,
    ):
        run.save(6)
    assert "inline_container" not in str(told.value)  # torch's own words
    assert run.names() == ["step-00000003"]
    run.save(6)
    assert run.directory().restore() == 6


def test_a_path_that_cannot_be_made_is_named(run: Run) -> None:
    run.path.write_text("a file, not a directory")
    with pytest.raises(CheckpointError, match=rf"{run.path}.*was not written: .*Not a directory"):
        run.save(3)


@pytest.mark.parametrize(("key", "value"), [("student", "b"), ("objective", "sft"), ("seed", "1")])
def test_a_checkpoint_of_another_run_is_refused_with_the_key(run: Run, key: str, value: str) -> None:
    run.save(3)
    with pytest.raises(CheckpointError, match=f"{key} is {value} now and was {IDENTITY[key]}"):
        run.directory(**{key: value}).restore()


def test_a_checkpoint_beyond_the_last_step_is_refused(run: Run) -> None:
    run.save(3)
    assert run.directory(steps=3).restore() == 3
    with pytest.raises(
        CheckpointError, match="after 3 steps, and the run is to have only 2: raise `steps`, or `epochs`"
    ):
        run.directory(steps=2).restore()


@pytest.mark.parametrize("is_unsealed", [False, True])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(run: Run, file: str, is_unsealed: bool) -> None:
    run.save(3)
    damaged = run.path / "step-00000003" / file
    damaged.write_bytes(damaged.read_bytes()[:10])
    if is_unsealed:  # as before there were digests
        (run.path / "step-00000003" / "digests.json").unlink()
    with pytest.raises(CheckpointError, match=f"{run.path / 'step-00000003'}.*cannot be read"):
        run.directory().restore()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "state.json is empty"),
        ('{"next_st', "state.json is cut short, or not JSON"),
        ("[]", "state.json does not say what it is to say"),
        ('{"next_step": 3}', "state.json does not say what it is to say"),
        (None, "there is no state.json in it"),
    ],
)
def test_what_is_wrong_with_a_checkpoints_state_is_said_in_words(run: Run, content: str | None, words: str) -> None:
    run.save(3)
    state = run.path / "step-00000003" / "state.json"
    state.unlink()
    if content is not None:
        state.write_text(content)
    write_seal(state.parent, [{}])  # so that nobody sees before that it is another file
    with pytest.raises(CheckpointError) as refused:
        run.directory().restore()
    told = f"{run.path / 'step-00000003'} cannot be read: {words}. Without that directory the run begins anew"
    assert str(refused.value) == told


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json", "digests.json"])
def test_a_flipped_bit_is_refused_with_the_checkpoint_to_go_on_from(run: Run, file: str) -> None:
    run.save(3)
    run.save(6)
    damaged = run.path / "step-00000006" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = [parameter.detach().clone() for parameter in run.student.parameters()]
    with pytest.raises(CheckpointError, match=f"{run.path / 'step-00000006'} cannot be read: .*{file}") as refused:
        run.directory().restore()
    assert str(refused.value).endswith("Without that directory the run continues from step-00000003")
    assert all(torch.equal(*pair) for pair in zip(run.student.parameters(), before, strict=True))
    shutil.rmtree(damaged.parent)
    assert run.directory().restore() == 3


def test_a_file_that_is_missing_is_named_and_that_the_run_would_begin_anew(run: Run) -> None:
    run.save(3)
    (run.path / "step-00000003" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: No such file.*the run begins anew"):
        run.directory().restore()


def test_one_that_was_given_another_steps_name_is_refused(run: Run) -> None:
    run.save(3)
    (run.path / "step-00000003").rename(run.path / "step-00000005")
    with pytest.raises(CheckpointError, match=r"step-00000005 cannot be read: .*it is of a checkpoint after 3 steps"):
        run.directory().restore()


def test_files_that_cannot_be_read_back_are_not_sealed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path, names: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run.save(3)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=r"was not written: .*Input/output"):
        patched.setattr(checkpoint, "digests_of", fail)
        run.save(6)
    assert run.names() == ["step-00000003"]


def test_a_checkpoint_without_digests_is_refused(run: Run) -> None:
    run.save(3)
    (run.path / "step-00000003" / "digests.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003 cannot be read: there is no digests\.json in it"):
        run.directory().restore()


def test_weights_moments_and_random_numbers_come_back(run: Run, tiny_models: TinyModels) -> None:
    run.train(steps=2)
    run.save(3)
    expected = torch.rand(3)
    run.train(steps=2)
    torch.manual_seed(99)
    assert run.directory().restore() == 3
    assert torch.equal(torch.rand(3), expected)
    state = json.loads((run.path / "step-00000003" / "state.json").read_text())
    assert state == {"next_step": 3, "world_size": 1, "identity": IDENTITY}


def test_a_run_begun_on_a_cpu_goes_on_with_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its random numbers are others: those of a GPU, which nobody had drawn from."""
    run.save(3)
    expected = torch.rand(3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(run, "_mesh", replace(run._mesh, device=torch.device("cuda", 0)))
    assert run.directory().restore() == 3
    assert torch.equal(torch.rand(3), expected)
