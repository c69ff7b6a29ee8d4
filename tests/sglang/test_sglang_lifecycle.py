"""A server that runs SGLang starts only when all is in place, and ends when SGLang does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from kdmesh.errors import RpcError
from kdmesh.handles.slab.runtime_dir import runtime_dir
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import sglang_environment, sglang_teacher, starting
from tests.support.teacher_process import TeacherProcess
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

_IS_HOOKED = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor as Processor
print(hasattr(Processor._append_prefill_hidden_states, "__wrapped__"))
"""


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def children(server: TeacherProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def scheduler(server: TeacherProcess) -> psutil.Process:
    (found,) = [child for child in children(server) if "scheduler" in " ".join(child.cmdline())]
    return found


def test_killed_scheduler_ends_the_server_at_once(tiny_models: TinyModels, directory: Path) -> None:
    with sglang_teacher(directory, tiny_models.path("qwen3")) as teacher:
        family = children(teacher)
        scheduler(teacher).kill()
        _, errors = teacher.process.communicate(timeout=60)  # nobody asks it for anything: it notices by itself
        assert teacher.process.returncode == 1
        assert "the SGLang scheduler tensor 0, data 0" in errors.splitlines()[-1]
        assert "died" in errors.splitlines()[-1]
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running()]


def test_requests_under_way_fail_when_the_scheduler_is_killed(tiny_models: TinyModels, directory: Path) -> None:
    asked = random_sequences([200] * 40, vocabulary_size=VOCABULARY_SIZE)
    with (
        sglang_teacher(directory, tiny_models.path("qwen3")) as teacher,
        TeacherPool([teacher.grpc], job="test", deadline_s=10) as pool,
    ):
        process = scheduler(teacher)
        process.suspend()
        pending = pool.submit(asked)
        teacher.until_slots("filling", 1)
        process.kill()
        assert teacher.process.wait(timeout=20) == 1
        with pytest.raises(RpcError):
            pending.wait()


def test_killed_scheduler_is_replaced_and_its_requests_get_their_rows_but_not_more_often_than_allowed(
    tiny_models: TinyModels, directory: Path
) -> None:
    asked = random_sequences([200] * 40, vocabulary_size=VOCABULARY_SIZE)
    engine = {"on_death": "restart", "max_restarts": 1}
    with (
        sglang_teacher(directory, tiny_models.path("qwen3"), engine=engine) as teacher,
        TeacherPool([teacher.grpc], job="test", deadline_s=100) as pool,
    ):
        held = pool.submit(asked).wait().rows_RD
        kept = held.clone()
        first = scheduler(teacher)
        first.suspend()
        pending = pool.submit(asked)
        teacher.until_slots("filling", 1)
        first.kill()
        teacher.wait_event("engine is started again")
        assert "the server's engine died" in teacher.get("/readyz")["reason"]
        assert torch.allclose(pending.wait().rows_RD, kept, rtol=1e-4, atol=1e-4)
        assert torch.equal(held, kept)
        assert pool.stats().retries > 0
        second = scheduler(teacher)
        assert second.pid != first.pid
        assert teacher.get("/readyz") == {"status": "ready"}
        second.kill()
        _, errors = teacher.process.communicate(timeout=20)
        assert teacher.process.returncode == 1
        assert "started again 1 times within 3600 s" in errors.splitlines()[-1]


def test_an_engine_that_was_not_made_for_it_does_not_sleep(tiny_models: TinyModels, directory: Path) -> None:
    with sglang_teacher(directory, tiny_models.path("qwen3")) as teacher:
        answer = httpx.post(f"http://{teacher.rest}/v1/sleep", json={"tags": ["weights"]})
        assert answer.status_code == 400
        assert answer.json()["reason"] == "this engine cannot sleep; start the server with engine.sleep: true"
        assert teacher.get("/readyz") == {"status": "ready"}


def named_memory(processes: Iterable[psutil.Process]) -> list[str]:
    """Files of /dev/shm that these processes have mapped, by whatever name."""
    maps = [
        line.split() for process in processes for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    ]
    inodes = {int(fields[4]) for fields in maps if len(fields) > 5 and fields[5].startswith("/dev/shm/")}
    return [file.path for file in os.scandir("/dev/shm") if file.inode() in inodes]


def test_sigterm_leaves_no_process_and_no_file(tiny_models: TinyModels, directory: Path) -> None:
    with sglang_teacher(directory, tiny_models.path("qwen3")) as teacher:
        family = children(teacher)
        named = named_memory(family)
        assert named
        teacher.signal(signal.SIGTERM)
        _, errors = teacher.process.communicate(timeout=30)
        assert teacher.process.returncode == 0, errors
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running()]
        assert os.listdir(directory) == ["teacher.yaml"]
        assert not list(filter(os.path.exists, named))


def test_what_a_killed_server_left_goes_when_another_one_starts(
    tiny_models: TinyModels, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sglang_teacher(directory, tiny_models.path("qwen3")) as teacher:
        family = children(teacher)
        named = named_memory(family)
        teacher.process.kill()
        psutil.wait_procs(family, timeout=60)
        assert list(filter(os.path.exists, named))
        monkeypatch.setattr(tempfile, "tempdir", str(directory))  # where that server had its own
        with runtime_dir(None) as started:
            assert set(os.listdir(directory)) == {"teacher.yaml", started.path.name}
        assert not list(filter(os.path.exists, named))


def test_a_server_that_is_killed_while_its_processes_load_leaves_none(tiny_models: TinyModels, directory: Path) -> None:
    with starting(directory, tiny_models.path("qwen3")) as process:
        server = psutil.Process(process.pid)
        while len([child for child in server.children() if "spawn_main" in " ".join(child.cmdline())]) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        family = server.children(recursive=True)
        process.kill()
        _, left = psutil.wait_procs(family, timeout=100)
        assert not left


def test_another_version_is_refused(tiny_models: TinyModels, directory: Path) -> None:
    metadata = directory / "site" / "sglang-0.5.99.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n", encoding="utf-8")
    paths = {"PYTHONPATH": os.pathsep.join([str(metadata.parent), sglang_environment()["PYTHONPATH"]])}
    with starting(directory, tiny_models.path("qwen3"), variables=paths) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "SGLang 0.5.99 is installed" in errors.splitlines()[-1]


def test_server_whose_plugin_did_not_load_does_not_start(tiny_models: TinyModels, directory: Path) -> None:
    with starting(directory, tiny_models.path("qwen3"), variables={"SGLANG_PLUGINS": "others"}) as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "0 of 1 SGLang schedulers reported" in errors.splitlines()[-1]


def test_unknown_argument_is_refused_by_name(tiny_models: TinyModels, directory: Path) -> None:
    engine = {"arguments": {"max_total_tokens": 4096, "no_such_argument": 1}}
    with starting(directory, tiny_models.path("qwen3"), engine=engine) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "no argument no_such_argument" in errors.splitlines()[-1]


@pytest.mark.parametrize("is_ours", [False, True])
def test_other_sglang_processes_are_left_as_they_are(directory: Path, is_ours: bool) -> None:
    ours = {"KDMESH_SGLANG_SOCKET": str(directory / "nowhere")} if is_ours else {}
    done = subprocess.run(
        [sys.executable, "-c", _IS_HOOKED], env=sglang_environment(**ours), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(is_ours)]
