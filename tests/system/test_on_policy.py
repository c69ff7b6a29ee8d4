"""On-policy jobs with the real services, which are killed one after the other."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.trainer_jobs import write_questions
from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS = 24
MIXED = {"sequences": 15, "max_tokens": 128}  # 12 samples and 3 answers of the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Three jobs of the same recipe, each with a rollout server of its own."""

    undisturbed: Job
    undisturbed_rollouts: Rollouts
    disturbed: Job  # its rollout server, its teacher and then itself were killed
    disturbed_rollouts: Rollouts  # the second server at its address
    first_trainer: Process
    second_trainer: Process
    teacher: Teacher  # of the first and the last; still serves
    stale: Job  # samples from weights that may be 2 updates old, on two ranks; its student is the teacher, blurred


def source(rollouts: Rollouts, **more: Any) -> dict[str, Any]:
    return {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
        **more,
    }


def blurred(model: Path, path: Path) -> Path:
    """A copy of a model with noise on its head: what must be learnt back is known, and the same for every prompt."""
    shutil.copytree(model, path)
    lm = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        noise = torch.randn(lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        lm.lm_head.weight.add_(0.2 * noise)
    lm.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("on_policy")
    recipe = replace(materials.plain, is_judged=True)
    learnable = replace(recipe, student=blurred(materials.teacher, root / "blurred"))
    students = {"a": recipe.student, "b": recipe.student, "c": learnable.student}
    servers = [Rollouts(processes, root / f"rollouts-{name}", student) for name, student in students.items()]
    teacher, other = (Teacher(processes, root / name, materials.teacher) for name in ("teacher", "other"))
    # The teacher of these two is told more than the student.
    data = {
        **{name: {"format": "chat", "path": str(recipe.data / f"{name}.jsonl")} for name in ("train", "held_out")},
        "max_tokens": 96,
        "teacher_context": {"kind": "system_prompt", "text": "It is asked when the brown fox returns a value."},
    }
    questions = {
        "path": str(write_questions(root / "questions.jsonl", 6, seed=3)),
        "samples": 2,
        "pass_at": [2],
        "sampling": {"temperature": 1.0, "max_new_tokens": 8},
        "match": {"name": "contains"},
    }
    undisturbed, disturbed = (
        Job(
            processes,
            root / name,
            recipe,
            address,
            steps=STEPS,
            source=source(rollouts, sampled_fraction=0.8, show_every=5),
            batch=MIXED,
            data=data,
            evaluation={"every": 8, "questions": questions},
        )
        for name, address, rollouts in (
            ("undisturbed", teacher.address, servers[0]),
            ("disturbed", other.address, servers[1]),
        )
    )
    stale = Job(
        processes,
        root / "stale",
        learnable,
        teacher.address,
        steps=STEPS,
        source=source(servers[2], max_staleness=2, update_policy="abort"),
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
    )
    for server in (teacher, other, *servers):
        server.start()
    running = [undisturbed.start(), stale.start_torchrun(2)]
    first = disturbed.start()
    # Each time in the middle of it: samples are owed, where most of the time goes; a step has just been taken.
    first.until(lambda: len(disturbed.steps()) >= 2)
    servers[1].process.signal(signal.SIGKILL)
    servers[1].start()
    first.until(lambda: len(disturbed.steps()) >= 7)
    other.process.signal(signal.SIGKILL)
    other.start()
    first.until(lambda: len(disturbed.steps()) >= 13)
    first.signal(signal.SIGKILL)
    first.exit_code()
    second = disturbed.start()
    for process in (*running, second):
        process.succeed()
    return Story(
        undisturbed=undisturbed,
        undisturbed_rollouts=servers[0],
        disturbed=disturbed,
        disturbed_rollouts=servers[1],
        first_trainer=first,
        second_trainer=second,
        teacher=teacher,
        stale=stale,
    )


def test_a_job_whose_services_were_killed_learns_exactly_the_same(story: Story) -> None:
    assert len(story.undisturbed.steps()) == STEPS
    assert story.disturbed.record() == story.undisturbed.record()
    assert len([line for line in story.disturbed.lines() if line["kind"] == "step"]) == STEPS


def test_every_step_says_how_the_run_is(story: Story) -> None:
    for step in story.undisturbed.steps():
        assert 1 <= step["response_tokens_mean"] <= step["response_tokens_max"] <= 24
        assert 0 <= step["cut_off_fraction"] <= 1
        assert 0 <= step["top1_agreement"] <= 1
        assert 0 < step["topk_overlap"] < 1
        assert 0 < step["student_entropy_nats"] < 6
        assert 0 < step["teacher_entropy_nats"] < 6
        assert set(step["phase_tokens_per_second"]) == {"sampling", "teacher", "update"}
        assert step["phase_tokens_per_second"]["update"] > 0
        assert step["bounded_by"] in ("sampling", "teacher", "update", "publish")
        assert {"batch", "update", "publish"} <= set(step["phase_s"])


def test_questions_go_to_the_servers_that_sample_and_need_no_weights_of_their_own(story: Story) -> None:
    for job in (story.undisturbed, story.disturbed):
        lines = [line for line in job.lines() if line["kind"] == "questions"]
        assert [line["step"] for line in lines] == [0, 8, 16, STEPS]
        assert all(line["num_samples"] == 12 for line in lines)
        assert len(list((job.output / "answers").iterdir())) == 4
    assert story.undisturbed_rollouts.weight_version() == STEPS + 1


def test_samples_are_shown_once_also_after_a_kill(story: Story) -> None:
    shown = [
        [json.loads(line) for line in (job.output / "samples.jsonl").read_text().splitlines()]
        for job in (story.undisturbed, story.disturbed)
    ]
    assert [line["step"] for line in shown[0]] == [0, 5, 10, 15, 20]
    assert shown[0] == shown[1]
    assert all(len(line["responses"]) == 2 and line["prompt"] for line in shown[0])
    assert all("brown fox returns a value." in line["teacher_prompt"] for line in shown[0])
    assert len(story.second_trainer.events("sample")) in (2 * 1, 2 * 2)


def test_a_rollout_server_that_comes_back_gets_the_student_before_it_samples(story: Story) -> None:
    published = story.first_trainer.events("weights published")
    assert published[-1]["weight_version"] > 3
    # The second process at the address begins without any; where it was missed in the middle of a step, it got the
    # step's weights once more.
    again = story.first_trainer.events("weights published again")
    assert [event["to"] for event in again] in ([], [[story.disturbed_rollouts.address]])
    assert story.disturbed_rollouts.process.events("weights replaced")


def test_a_job_that_was_killed_goes_on_from_its_checkpoint_under_higher_weight_versions(story: Story) -> None:
    [event] = story.second_trainer.events("continuing from a checkpoint")
    assert event["step"] in (12, 16)
    versions = [event["weight_version"] for event in story.second_trainer.events("weights published")]
    earlier = [event["weight_version"] for event in story.first_trainer.events("weights published")]
    assert versions[0] > max(earlier)
    assert story.disturbed_rollouts.weight_version() == versions[-1]
    assert story.undisturbed_rollouts.weight_version() == STEPS + 1


def test_the_sampler_is_the_student_that_is_trained(story: Story) -> None:
    for step in story.undisturbed.steps():
        assert abs(step["sampler_kl_k1_nats"]) < 1e-5
        assert 0 <= step["sampler_kl_k3_nats"] < 1e-8
        assert step["staleness_steps_max"] == 0


def test_stale_samples_stay_within_their_bound(story: Story) -> None:
    steps = story.stale.steps()
    assert len(steps) == STEPS
    assert 0 < max(step["staleness_steps_max"] for step in steps) <= 2
    assert max(step["sampler_kl_k3_nats"] for step in steps) > 1e-8


def test_held_out_distance_to_the_teacher_falls(story: Story) -> None:
    for job, part in ((story.undisturbed, 0.75), (story.stale, 0.5)):
        scores = [line["kl_nats_per_token"] for line in job.lines() if line["kind"] == "evaluation"]
        assert scores[-1] < part * scores[0]


@pytest.mark.slow
def test_a_rollout_server_that_comes_back_while_another_samples_gets_the_student_at_once(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    slow, back = (Rollouts(processes, tmp_path / name, materials.plain.student) for name in ("slow", "back"))
    section = source(slow)
    section["rollouts"] |= {"addresses": [slow.address, back.address], "door": "collective"}
    job = Job(processes, tmp_path / "job", materials.plain, story.teacher.address, steps=1000, source=section)
    for server in (slow, back):
        server.start()
    trainer = job.start()
    trainer.until(lambda: len(job.steps()) >= 1)
    back.process.signal(signal.SIGKILL)
    trainer.until(lambda: len(job.steps()) >= 3)  # it is not waited for
    trainer.until(lambda: slow.num_waiting() >= 3)
    slow.process.signal(signal.SIGSTOP)  # so the step's samples are not all there, and nothing is published
    back.start()
    back.wait_ready()
    trainer.until(lambda: back.weight_version() > 0)
    slow.process.signal(signal.SIGCONT)
    trainer.signal(signal.SIGTERM)  # it has far more steps to do than the test needs
    trainer.succeed()
    assert [event["to"] for event in trainer.events("weights published again")] == [[back.address]]
    assert {event["door"] for event in trainer.events("weights on their way")} == {"gloo"}


@pytest.mark.slow
def test_a_job_whose_rollout_server_stays_away_says_so(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    section = source(rollouts)
    section["rollouts"]["deadline_s"] = 8  # long enough for a server that starts
    job = Job(processes, tmp_path / "job", materials.plain, story.teacher.address, source=section)
    gate = job.gate(5)
    rollouts.start()
    rollouts.wait_ready()
    trainer = job.start()
    trainer.until(gate.is_reached)
    rollouts.process.signal(signal.SIGKILL)
    gate.let_go()
    assert trainer.exit_code() == 3
    [sentence] = trainer.words()
    assert rollouts.address in sentence
    assert "8" in sentence
