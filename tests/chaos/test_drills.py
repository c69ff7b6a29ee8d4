"""Faults at random moments, done to real processes: every job ends as if there had been none."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.clock import Clock
from tests.chaos.world import JOBS, LEASE_S, Running, World, tend_all, until
from tests.system.guard import Guard

pytestmark = pytest.mark.chaos

_EVENTS = 8
_SLOW_SOCKETS = 200


def steps(running: list[Running]) -> int:
    """That all jobs have done together."""
    return sum(len(each.job.steps()) for each in running)


def wait_some_steps(world: World, running: list[Running], chance: random.Random) -> None:
    """A random number of steps, or none where a job is being started again."""
    target = steps(running) + chance.randint(1, 4)
    ends_s = time.monotonic() + 60
    while steps(running) < target and time.monotonic() < ends_s:
        world.tend_teachers()
        if tend_all(running):
            return
        time.sleep(0.02)


def kill_teacher(world: World, running: list[Running], chance: random.Random) -> None:
    killed = chance.choice(world.teachers).process
    killed.signal(signal.SIGKILL)
    killed.exit_code()  # else whoever looks at once, as behind the last fault, takes it for one that lives


def stop_teacher(world: World, running: list[Running], chance: random.Random) -> None:
    teacher = chance.choice(world.teachers)
    if not teacher.process.has_ended():
        _pause(psutil.Process(teacher.process.pid), chance)


def kill_rank(world: World, running: list[Running], chance: random.Random) -> None:
    for rank in chance.choice(running).ranks()[:1]:
        rank.kill()


def stop_rank(world: World, running: list[Running], chance: random.Random) -> None:
    for rank in chance.choice(running).ranks()[:1]:
        _pause(rank, chance)


def _pause(process: psutil.Process, chance: random.Random) -> None:
    """Stop it for less than a lease, or for more."""
    with suppress(psutil.NoSuchProcess):  # a rank that is killed meanwhile, since another of its job has ended
        process.suspend()
        time.sleep(chance.choice((0.3, 2 * LEASE_S)))
        process.resume()


FAULTS: tuple[Callable[[World, list[Running], random.Random], None], ...] = (
    kill_teacher,
    stop_teacher,
    kill_rank,
    stop_rank,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_jobs_learn_the_same_whatever_is_killed_or_stopped(
    world: World, fault: Callable[[World, list[Running], random.Random], None]
) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    with world.drill() as running:
        for _ in range(3):
            wait_some_steps(world, running, chance)
            fault(world, running, chance)


def test_jobs_learn_the_same_through_many_faults_of_every_kind(world: World) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    with world.drill() as running:
        for _ in range(_EVENTS):
            wait_some_steps(world, running, chance)
            chance.choice(FAULTS)(world, running, chance)


def test_a_rolling_restart_under_load_ends_no_job(world: World) -> None:
    with world.drill() as running:
        chance = random.Random(0)
        for teacher in world.teachers:
            wait_some_steps(world, running, chance)
            teacher.process.signal(signal.SIGTERM)
            assert teacher.process.exit_code() == 0
            teacher.start()
            teacher.wait_ready()
    assert [each.starts for each in running] == [1, 1, 1]


def test_a_job_that_never_lets_go_takes_no_more_than_its_quota(world: World) -> None:
    with world.drill() as running:
        hogs = [
            world.processes.start("hog", running[0].job.config.parent, sys.executable, "-m", "tests.chaos.hog", address)
            for address in (teacher.address for teacher in world.teachers)
        ]
        for hog, teacher in zip(hogs, world.teachers, strict=True):
            hog.until(lambda hog=hog: len(hog.words()) >= 4)  # 1 MiB in slots of a quarter
            assert sum(teacher.slots("hog")) == 4
        for each in running:
            until(each.tend, "a job waits for the hog", within_s=300)
        assert [len(hog.words()) for hog in hogs] == [4, 4]
        for hog in hogs:
            hog.signal(signal.SIGKILL)
    assert [each.starts for each in running] == [1, 1, 1]


def test_strangers_that_send_garbage_or_dribble_disturb_nobody(world: World) -> None:
    chance = random.Random(0)
    with world.drill() as running, ExitStack() as stack:
        for teacher in world.teachers:
            host, _, port = teacher.address.partition(":")
            slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(_SLOW_SOCKETS)]
            for dribbling in slow:
                dribbling.send(b"PRI * HTTP/2.0\r\n"[: chance.randint(1, 16)])
            for _ in range(50):
                _send_garbage(host, int(port), chance)
            _send_garbage(host, int(teacher.rest.rpartition(":")[2]), chance)
            answer = httpx.post(f"{teacher.rest}/v1/model", content=b"x" * 2**24)
            assert answer.status_code == 405
        wait_some_steps(world, running, chance)
    assert [each.starts for each in running] == [1, 1, 1]


def test_jobs_learn_the_same_while_every_secret_is_exchanged(world: World, tmp_path: Path) -> None:
    chance = random.Random(0)
    guard = Guard(tmp_path / "secrets", *JOBS)
    with world.beside("guarded", guard=guard) as guarded, guarded.drill() as running:
        for teacher in guarded.teachers:
            for _ in range(2):
                wait_some_steps(guarded, running, chance)
                guard.exchange()
            teacher.process.signal(signal.SIGKILL)  # it reads the new ones when it starts
    assert [each.starts for each in running] == [1, 1, 1]


def test_jobs_learn_the_same_while_a_disk_is_full(world: World, tmp_path: Path) -> None:
    """Each teacher keeps rows on a disk of its own, which somebody else fills, and makes free again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m tmpfs "{disk}" && exec "$@"'
    cache = {"directory": str(disk / "rows"), "directory_mib": 2}
    through = ("unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", mount, "sh")
    with world.beside("full", through=through, cache=cache) as full, full.drill() as running:
        wait_some_steps(full, running, random.Random(0))
        for teacher in full.teachers:
            _fill(Path(f"/proc/{teacher.process.pid}/root{disk}/others"))
        for each in running:
            until(each.tend, "a job waits for the disk", within_s=300)
        for teacher in full.teachers:
            assert "No space left" in str(teacher.get("/v1/cache"))
    assert [each.starts for each in running] == [1, 1, 1]


def _fill(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def test_jobs_learn_the_same_while_clocks_jump(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calendar's, by hours, on one side or the other; leases and deadlines go by the clock that only ticks."""
    clocks = [Clock(tmp_path / name) for name in ("teachers", "jobs")]
    chance = random.Random(0)
    for name, value in clocks[0].environment().items():
        monkeypatch.setenv(name, value)
    with world.beside("clocks") as shaken:
        for name, value in clocks[1].environment().items():
            monkeypatch.setenv(name, value)
        with shaken.drill() as running:
            for hours in (2, -3, 26, 0):
                wait_some_steps(shaken, running, chance)
                chance.choice(clocks).jump(hours)
            written = [line["time"] - time.time() for each in running for line in each.job.lines()]
    assert max(map(abs, written)) > 3600  # they did jump
    assert [each.starts for each in running] == [1, 1, 1]


def _send_garbage(host: str, port: int, chance: random.Random) -> None:
    with socket.create_connection((host, port)) as stranger:
        stranger.settimeout(5)
        try:
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" * chance.randint(0, 1) + chance.randbytes(4096))
            while stranger.recv(4096):
                pass
        except OSError:  # it hung up, or waits for more
            return
