"""Jobs of `kdmesh submit` as pods of a real node, with a teacher of the chart; by name only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.api_server import ADMIN, NAMESPACE
from tests.node.conftest import World
from tests.node.machine import DOMAIN, NAME
from tests.node.pods import events, is_ready, until
from tests.node.release import Release, teacher
from tests.node.training import MATERIALS, Training, described, num_steps, run
from tests.system import training

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def jobs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(world.server.kubeconfig(ADMIN, "trains")))
        yield Training(world.server, tmp_path_factory.mktemp("training") / "own")


@pytest.fixture(scope="module")
def release(world: World, jobs: Training, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """A teacher with a model, which shares its memory with pods that mount the claim of its sockets."""
    sockets = tmp_path_factory.mktemp("sockets")
    made = world.release("taught", tmp_path_factory.mktemp("release"))
    config = {
        "engine": {"kind": "transformers", "device": "cpu", "deterministic": True},
        "slab": {"slots": 16, "slot_mib": 0.25},
        "server": {"drain_s": 20},
    }
    sharing = {"mode": "claim", "path": str(sockets), "node": NAME}
    made.install(teacher(replicas=1, model={"uri": f"pvc://{MATERIALS}/teacher"}, config=config, sharing=sharing))
    yield made
    world.end(made)


def start(jobs: Training, release: Release, name: str) -> Path:
    """Where it writes."""
    output = jobs.prepare(name)
    resubmit(jobs, release, name)
    return output


def taught_by(release: Release) -> dict[str, object]:
    """The section of a configuration."""
    return {"addresses": [f"dns:///{release.teacher}.{NAMESPACE}.svc.{DOMAIN}:50051"], "deadline_s": 300}


def resubmit(jobs: Training, release: Release, name: str) -> None:
    jobs.submit(name, "--volume", f"{release.teacher}-sharing:/run/kdmesh:rw", teacher=taught_by(release))


@pytest.fixture(scope="module")
def undisturbed(jobs: Training, release: Release) -> Path:
    output = start(jobs, release, "undisturbed")
    jobs.until_finished("undisturbed")
    return output


def test_a_job_finds_its_teacher_reads_its_memory_and_leaves_the_student(undisturbed: Path) -> None:
    log = run("logs", "undisturbed").splitlines()
    (door,) = events(log, "rows have a door")
    assert door["door"] == "shm"
    losses = [line["loss_nats_per_token"] for line in training.lines(undisturbed) if line["kind"] == "step"]
    assert len(losses) == 400 and losses[-1] < 0.7 * losses[0]
    assert (undisturbed / "final" / "model.safetensors").is_file()
    (pod,) = described("undisturbed")["pods"]
    assert pod["machine"] == NAME and pod["phase"] == "Succeeded"


def test_an_evicted_job_goes_on_in_another_pod_and_learns_the_same(
    world: World, jobs: Training, release: Release, undisturbed: Path
) -> None:
    output = start(jobs, release, "evicted")
    until(lambda: num_steps(output) > 20)
    (first,) = described("evicted")["pods"]
    status, said = world.pods.evict(first["name"])
    assert status == 201, said
    jobs.until_finished("evicted")
    assert described("evicted")["pods"][-1]["name"] != first["name"]
    assert training.record(output) == training.record(undisturbed)


def test_a_teacher_s_pod_is_replaced_under_a_job_which_loses_nothing(
    world: World, jobs: Training, release: Release, undisturbed: Path
) -> None:
    output = start(jobs, release, "retaught")
    until(lambda: num_steps(output) > 20)
    (pod,) = world.pods.of("teacher", release.name)
    world.pods.delete(pod["metadata"]["name"])
    jobs.until_finished("retaught")
    (other,) = world.pods.of("teacher", release.name)
    assert other["metadata"]["uid"] != pod["metadata"]["uid"] and is_ready(other)
    assert training.record(output) == training.record(undisturbed)


def test_a_cancelled_job_leaves_a_checkpoint_which_the_same_submission_continues(
    jobs: Training, release: Release, undisturbed: Path
) -> None:
    output = start(jobs, release, "cancelled")
    until(lambda: num_steps(output) > 20)
    run("cancel", "cancelled", "--wait")
    done = num_steps(output)
    assert 20 < done < 400
    assert (output / "checkpoints" / f"step-{done:08}").is_dir()
    resubmit(jobs, release, "cancelled")
    jobs.until_finished("cancelled")
    assert training.record(output) == training.record(undisturbed)


def test_a_job_that_cannot_be_says_why(jobs: Training, release: Release) -> None:
    jobs.prepare("wild")
    wild = {"learning_rate": 1e30, "schedule": "constant", "warmup_steps": 12}
    jobs.submit("wild", "--retries", "0", teacher=taught_by(release), optimizer=wild)
    until(lambda: jobs.state("wild") == "failed")
    (pod,) = described("wild")["pods"]
    assert pod["reason"].startswith("exit code 2: ") and "finite" in pod["reason"]


def test_two_nodes_find_each_other_by_name_and_train_one_student(
    world: World, jobs: Training, release: Release, undisturbed: Path
) -> None:
    output = jobs.prepare("several")
    pods = jobs.submit_nodes("several", teacher=taught_by(release), steps=40)

    def have_ended() -> bool:
        phases = [(world.pods.get(pod) or {})["status"]["phase"] for pod in pods]
        assert "Failed" not in phases, [world.pods.log(pod) for pod in pods]
        return set(phases) == {"Succeeded"}

    until(have_ended)
    losses, alone = (
        [line["loss_nats_per_token"] for line in training.lines(path) if line["kind"] == "step"][:40]
        for path in (output, undisturbed)
    )
    assert losses == pytest.approx(alone, rel=1e-5)
