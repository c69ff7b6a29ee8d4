"""A rollout server that runs SGLang ends when SGLang does, and its samples are drawn elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.types import Sampling
from tests.support.rollout_samples import prompt
from tests.support.sglang_rollouts import scheduler, sglang_rollout, starting
from tests.support.teacher_process import TeacherProcess, await_ready, started
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang


@contextlib.contextmanager
def embedded_rollout(directory: Path, model: Path) -> Iterator[TeacherProcess]:
    """Another server of the same model, which runs it by itself."""
    tree = {
        "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "threads": 1},
        "server": {"port": 0, "rest_port": 0},
    }
    path = directory / "rollout.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with started(directory, "-m", "kdmesh_rollout", str(path)) as process:
        yield await_ready(process)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def test_samples_of_a_killed_scheduler_are_drawn_by_another_server(
    tiny_models: TinyModels, directory: Path, tmp_path: Path
) -> None:
    model = tiny_models.path()
    with (
        sglang_rollout(directory, model) as server,
        embedded_rollout(tmp_path, model) as other,
        RolloutPool([server.grpc, other.grpc], job="test", deadline_s=150) as pool,
    ):
        family = psutil.Process(server.process.pid).children(recursive=True)
        process = scheduler(server)
        process.suspend()
        prompts = [prompt(9, seed=seed, vocabulary_size=VOCABULARY_SIZE) for seed in range(6)]
        pending = [pool.submit(ids, Sampling(max_new_tokens=20), num_samples=2, seed=1) for ids in prompts]
        while not server.get("/v1/queue")["running"]:
            pass
        process.kill()
        assert [sample.num_tokens for one in pending for sample in one.wait()] == [20] * 12
        assert pool.stats().retries > 0
        _, errors = server.process.communicate(timeout=20)
        assert server.process.returncode == 1
        assert "the SGLang scheduler tensor 0, data 0" in errors.splitlines()[-1]
        assert "died" in errors.splitlines()[-1]
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running()]


def test_killed_scheduler_is_replaced_and_its_samples_are_drawn_with_the_first_weights(
    tiny_models: TinyModels, directory: Path
) -> None:
    with (
        sglang_rollout(directory, tiny_models.path(), on_death="restart") as server,
        RolloutPool([server.grpc], job="test", deadline_s=100) as pool,
    ):
        first = scheduler(server)
        first.suspend()
        prompts = [prompt(9, seed=seed, vocabulary_size=VOCABULARY_SIZE) for seed in range(4)]
        pending = [pool.submit(ids, Sampling(max_new_tokens=20), num_samples=2, seed=1) for ids in prompts]
        while not server.get("/v1/queue")["running"]:
            pass
        first.kill()
        assert [sample.num_tokens for one in pending for sample in one.wait()] == [20] * 8
        assert pool.stats().retries > 0
        assert scheduler(server).pid != first.pid
        assert server.get("/v1/model")["weight_version"] == 0


def test_idle_server_ends_when_its_scheduler_is_killed(tiny_models: TinyModels, directory: Path) -> None:
    with sglang_rollout(directory, tiny_models.path()) as server:
        scheduler(server).kill()
        assert server.process.wait(20) == 1


def test_sigterm_leaves_no_process_and_no_file(tiny_models: TinyModels, directory: Path) -> None:
    with sglang_rollout(directory, tiny_models.path()) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.signal(signal.SIGTERM)
        _, errors = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, errors
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running()]
        assert os.listdir(directory) == ["rollout.yaml"]


def test_server_whose_plugin_did_not_load_does_not_start(tiny_models: TinyModels, directory: Path) -> None:
    with starting(directory, tiny_models.path(), variables={"SGLANG_PLUGINS": "others"}) as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "0 of 1 SGLang schedulers reported" in errors.splitlines()[-1]
