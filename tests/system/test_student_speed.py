"""A job with compiled layers, checkpointed ones and moments of 8 bits, with the real services, through a kill."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.support.tiny_models import TinyModels
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytest.importorskip("torchao")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]

STEPS, TRACED = 12, 9
LONGEST_S = 300.0  # compiling, on a machine that has other things to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of the same recipe, one rank each."""

    plain: Job
    fast: Job
    killed: Job  # fast too; killed after a checkpoint, and started again


@pytest.fixture(scope="module")
def story(
    materials: Materials, tiny_models: TinyModels, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("speed")
    wide = tiny_models.path("qwen3", seed=1, hidden_size=128, intermediate_size=256, head_dim=32)
    recipe = replace(materials.plain, student=wide, is_judged=True)
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    student = {"model": str(wide), "device": "cpu"}
    optimizer = {"learning_rate": 2e-3, "schedule": "constant"}
    plain = {"student": student, "optimizer": optimizer}
    fast = {
        "student": {**student, "compile": "layers", "activation_checkpointing": "half"},
        "optimizer": {**optimizer, "moments": "8bit"},
        "profile": {"steps": [TRACED]},
    }
    choices = {"plain": plain, "fast": fast, "killed": fast}
    jobs = {
        name: Job(processes, root / name, recipe, teacher.address, steps=STEPS, **sections)
        for name, sections in choices.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root / "compiled"))  # what one has compiled, the others find
        teacher.start()
        for name in ("plain", "fast"):
            assert jobs[name].start().exit_code(within_s=LONGEST_S) == 0
        first = jobs["killed"].start()
        first.until(lambda: len(jobs["killed"].steps()) >= 6, within_s=LONGEST_S)
        first.signal(signal.SIGKILL)
        first.exit_code()
        assert jobs["killed"].start().exit_code(within_s=LONGEST_S) == 0
        yield Story(**jobs)


def test_it_learns_what_a_plain_job_learns(story: Story) -> None:
    fast, plain = ([step["loss_nats_per_token"] for step in job.steps()] for job in (story.fast, story.plain))
    assert fast == pytest.approx(plain, rel=0.02)
    assert fast[0] == pytest.approx(plain[0], rel=1e-5)  # before the first update
    assert fast[-1] < fast[0]


def test_a_job_that_was_killed_learns_exactly_the_same(story: Story) -> None:
    assert len(story.fast.steps()) == STEPS
    assert story.killed.record() == story.fast.record()


def test_the_step_that_was_to_be_traced_is(story: Story) -> None:
    assert sorted(path.name for path in (story.fast.output / "profile").iterdir()) == [
        f"step-{TRACED:08d}-rank-0.json.gz",
        f"step-{TRACED:08d}-rank-0.txt",
    ]


def test_a_checkpoint_is_not_continued_with_other_moments(story: Story) -> None:
    refused = story.fast.start("optimizer.moments=float32", f"steps={STEPS + 1}")
    assert refused.exit_code() == 2
    assert "optimizer.moments is None now and was 8bit" in refused.log.read_text()
