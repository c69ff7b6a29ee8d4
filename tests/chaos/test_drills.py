"""Faults at random moments, done to real processes: every job ends as if there had been none."""

from __future__ import annotations

import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx
import psutil
import pytest

from tests.chaos.world import LEASE_S, Running, World, tend_all, until

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
    chance.choice(world.teachers).process.signal(signal.SIGKILL)


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


def _send_garbage(host: str, port: int, chance: random.Random) -> None:
    with socket.create_connection((host, port)) as stranger:
        stranger.settimeout(5)
        try:
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" * chance.randint(0, 1) + chance.randbytes(4096))
            while stranger.recv(4096):
                pass
        except OSError:  # it hung up, or waits for more
            return
