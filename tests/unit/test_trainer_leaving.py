"""How a rank leaves the others: with them when the run ends well, and alone when it fails."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from kdmesh.errors import ModelMismatch
from kdmesh_trainer import __main__ as command
from kdmesh_trainer import build, loop
from kdmesh_trainer.mesh import joined, leave
from kdmesh_trainer.sections.parallel_config import ParallelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = SimpleNamespace(
    student=SimpleNamespace(device="cpu"),
    parallel=ParallelConfig(),
    all_teachers={},
    source=None,
    steps=1,
    evaluation=SimpleNamespace(rollouts=None, every=1),
    checkpoint=SimpleNamespace(every=1),
    export=SimpleNamespace(every=None),
    tracing=None,
)


@pytest.mark.parametrize(
    ("device", "ranks", "has_failed", "is_destroyed"),
    [
        (GPU, 2, False, True),
        (GPU, 2, True, False),  # NCCL would wait for the other
        (GPU, 1, True, True),
        (CPU, 2, True, True),  # gloo tells the other
    ],
)
def test_a_rank_that_fails_waits_for_no_other(
    device: torch.device, ranks: int, has_failed: bool, is_destroyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined("cpu", longest_wait_s=10):
        with monkeypatch.context() as patched:
            destroyed: list[bool] = []
            patched.setattr(dist, "get_world_size", lambda: ranks)
            patched.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
            leave(device, has_failed=has_failed)
        assert bool(destroyed) is is_destroyed


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the rank had failed, each time one left."""
    seen: list[bool] = []

    def noticed(device: torch.device, *, has_failed: bool) -> None:
        seen.append(has_failed)
        leave(device, has_failed=has_failed)

    monkeypatch.setattr("kdmesh_trainer.mesh.leave", noticed)
    return seen


def test_what_is_raised_is_a_failure_and_nothing_else_is(left: list[bool]) -> None:
    with joined("cpu", longest_wait_s=10):
        pass
    with pytest.raises(KeyError), joined("cpu", longest_wait_s=10):
        raise KeyError
    assert left == [False, True]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelMismatch("other weights"), 2), (KeyboardInterrupt(), 130), (RuntimeError("a collective broke"), 1)],
)
def test_a_failure_that_was_told_is_one_for_the_other_ranks_too(
    error: BaseException, status: int, left: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(build, "built", fails)
    monkeypatch.setattr("kdmesh_trainer.mesh.Mesh.is_first_to_fail", lambda mesh: False)
    assert command._join(CONFIG) == status  # type: ignore[arg-type]
    assert left == [True]


@pytest.mark.parametrize(
    ("done", "environment", "status"),
    [
        (0, {}, 130),
        (3, {}, 0),
        (0, {"KDMESH_EXIT_WHEN_STOPPED": "75"}, 75),
        (3, {"KDMESH_EXIT_WHEN_STOPPED": "75"}, 75),
    ],
)
def test_a_run_that_is_stopped_ends_well_only_where_it_has_a_checkpoint(
    done: int, environment: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "built", lambda *_, **__: nullcontext((None, SimpleNamespace(steps=5))))
    monkeypatch.setattr(loop, "run", lambda parts, schedule: done)
    assert command._join(CONFIG) == status  # type: ignore[arg-type]


def test_a_full_device_is_told_in_a_sentence_that_says_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
        "free. Process 7 has 78.00 GiB memory in use. If reserved but unallocated memory is large try setting X"
    )

    def fails(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(build, "built", fails)
    assert command._join(CONFIG) == 2  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert told.startswith(
        "Error: rank 0 has no memory left on its device: CUDA out of memory. Tried to allocate 2.00 GiB. "
    )
    assert "1.02 GiB is free. `kdmesh plan` says what takes most" in told
    assert "Process 7" not in told and "Traceback" not in told


def test_an_error_that_nobody_caught_is_told_before_the_process_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> NoReturn:
        raise ValueError("a mistake")

    monkeypatch.setattr(command, "main", fails)
    assert command._told() == 1
    assert "ValueError: a mistake" in capsys.readouterr().err
