"""Holds what the launcher promises, with real processes: ready or said why, and nothing left afterwards."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from kdmesh import exit_codes
from kdmesh.launch import local

SERVICE = """
    import json, os, signal, sys
    report = sys.argv[sys.argv.index("--ready-file") + 1]
    print("loading", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with open(report + ".part", "w") as file:
        json.dump({"port": 7, "pid": os.getpid()}, file)
    os.replace(report + ".part", report)
    signal.pause()
"""
IGNORES_TERM = """
    import signal, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    while True:
        signal.pause()
"""


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-c", textwrap.dedent(script))


def quiet(script: str, name: str = "child", grace_s: float = 30.0) -> local.Command:
    return local.Command(name=name, argv=python(script), on_line=lambda line: None, grace_s=grace_s)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def await_gone(pids: list[int], within_s: float = 30.0) -> None:
    """Block until every process is gone: their descriptors become readable then."""
    deadline = time.monotonic() + within_s
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        os.close(descriptor)
        assert ready, f"process {pid} outlived its launcher"


def test_a_service_is_up_inside_the_block_and_gone_after_it() -> None:
    with local.Processes() as processes:
        report = processes.serve(quiet(SERVICE, "teacher"), ready_within_s=60)
        assert report["port"] == 7
        assert not is_gone(report["pid"])
    assert is_gone(report["pid"])


def test_waiting_for_a_service_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with local.Processes() as processes:
        processes.serve(quiet(SERVICE, "teacher"), ready_within_s=60)
        assert list(tmp_path.iterdir()) == []


def test_a_service_that_exits_before_it_is_ready_is_reported() -> None:
    lines: list[str] = []
    fails = "import sys; print('port 7 is taken'); sys.exit(2)"
    command = local.Command(name="teacher", argv=python(fails), on_line=lines.append)
    refusal = pytest.raises(local.ChildFailed, match=r"^teacher exited with code 2$")
    with refusal as caught, local.Processes() as processes:
        processes.serve(command, ready_within_s=60)
    assert (caught.value.exit_code, caught.value.is_told, lines) == (2, True, ["port 7 is taken"])


def test_a_service_that_is_never_ready_is_given_up_with_its_last_lines_and_ended() -> None:
    seen: list[str] = []
    before = psutil.Process().children(recursive=True)
    event = """
    print('{"level": "info", "event": "loading"}')"""
    never = local.Command(name="teacher", argv=python(event + IGNORES_TERM), on_line=seen.append, grace_s=0.1)
    refusal = pytest.raises(local.ChildFailed, match=r"(?s)not ready within 1.5 s.*deaf")
    with refusal as caught, local.Processes() as processes:
        processes.serve(never, ready_within_s=1.5)
    assert len(seen) == 2 and seen[1] == "deaf"
    assert "loading" not in str(caught.value)  # the reason is not buried in events
    assert psutil.Process().children(recursive=True) == before


def test_a_deaf_child_is_killed_after_its_grace() -> None:
    with local.Processes() as processes:
        (child,) = processes.start(quiet(IGNORES_TERM, grace_s=0.2))
    assert child.exit_code in (-signal.SIGKILL, -signal.SIGTERM)  # TERM when it had not yet closed its ears


def test_groups_are_stopped_in_reverse_order() -> None:
    order: list[str] = []
    says_when = """
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped {sys.argv[1]}"))
        print("up", sys.argv[1])
        while True:
            signal.pause()
    """
    up_read, up_write = os.pipe()

    def record(line: str) -> None:
        order.append(line)
        os.write(up_write, b".")

    def command(name: str) -> local.Command:
        return local.Command(name=name, argv=(*python(says_when), name), on_line=record)

    with local.Processes() as processes:
        for name in ("teacher", "trainer"):
            processes.start(command(name))
            assert os.read(up_read, 1) == b"."
    os.close(up_read)
    os.close(up_write)
    assert order == ["up teacher", "up trainer", "stopped trainer", "stopped teacher"]


def test_what_a_child_leaves_in_its_session_ends_with_it() -> None:
    lines: list[str] = []
    parent = """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid)
    """
    with local.Processes() as processes:
        children = processes.start(local.Command(name="parent", argv=python(parent), on_line=lines.append))
        processes.wait(children)
    await_gone([int(lines[0])])


def test_waiting_ends_when_every_rank_has_succeeded() -> None:
    with local.Processes() as processes:
        ranks = processes.start(quiet("pass", "rank 0"), quiet("pass", "rank 1"))
        processes.wait(ranks)
    assert [rank.exit_code for rank in ranks] == [0, 0]


def test_a_refused_rank_is_named_even_when_another_fails_first() -> None:
    waits_for_death = "import sys; sys.stdin.read(); sys.exit(1)"
    refused = "import sys, time; time.sleep(0.3); sys.exit(2)"
    refusal = pytest.raises(local.ChildFailed, match="rank 1 exited with code 2")
    with refusal as caught, local.Processes() as processes:
        processes.wait(processes.start(quiet(waits_for_death, "rank 0"), quiet(refused, "rank 1")))
    assert caught.value.exit_code == exit_codes.REFUSED


def test_a_rank_that_waits_for_a_dead_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_FAILING_TOGETHER_S", 0.2)
    with pytest.raises(local.ChildFailed, match="rank 1 exited with code 1"), local.Processes() as processes:
        ranks = processes.start(quiet(IGNORES_TERM, "rank 0"), quiet("raise SystemExit(1)", "rank 1"))
        processes.wait(ranks)
    assert ranks[0].exit_code == -signal.SIGKILL


def test_a_service_that_dies_while_ranks_work_ends_the_wait() -> None:
    with pytest.raises(local.ChildFailed, match="teacher was killed by SIGKILL"), local.Processes() as processes:
        report = processes.serve(quiet(SERVICE, "teacher"), ready_within_s=60)
        ranks = processes.start(quiet("import signal; signal.pause()", "rank 0"))
        os.kill(report["pid"], signal.SIGKILL)
        processes.wait(ranks)
    assert ranks[0].exit_code is not None


LAUNCHER = """
    import sys
    from kdmesh.launch import local

    service, rank = sys.argv[1:]
    python = (sys.executable, "-u", "-c")
    try:
        with local.Processes() as processes:
            teacher = local.Command(name="teacher", argv=(*python, service), on_line=lambda line: None)
            report = processes.serve(teacher, ready_within_s=60)
            ranks = processes.start(
                *(local.Command(name="rank", argv=(*python, rank), orphan_signal=9, grace_s=60) for _ in range(2))
            )
            print(report["pid"], flush=True)
            processes.wait(ranks)
    except local.Stopped as stopped:
        print(stopped.signum, [rank.exit_code for rank in ranks], flush=True)
"""
RANK = """
    import os, signal, sys
    def stop(*_):
        os.write(1, b"checkpoint\\n")  # one write: two ranks share the pipe
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    os.write(1, b"%d\\n" % os.getpid())
    while True:
        signal.pause()
"""


def launch(rank: str, *before: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher, run by `before`, with a service and two ranks; the process ids of all three children, all up."""
    scripts = [textwrap.dedent(script) for script in (SERVICE, rank)]
    launcher = subprocess.Popen(
        ["env", "--default-signal=HUP", *before, sys.executable, "-u", "-c", textwrap.dedent(LAUNCHER), *scripts],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    return launcher, [int(launcher.stdout.readline()) for _ in range(3)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_ranks_checkpoint_and_leaves_no_process(signum: signal.Signals) -> None:
    launcher, children = launch(RANK)
    launcher.send_signal(signum)
    output, _ = launcher.communicate(timeout=60)
    assert output.splitlines() == ["checkpoint", "checkpoint", f"{int(signum)} [0, 0]"]
    assert launcher.returncode == 0
    assert all(is_gone(pid) for pid in children)


def test_a_run_goes_on_after_a_hangup_that_it_was_to_ignore() -> None:
    launcher, children = launch(RANK, "nohup")
    launcher.send_signal(signal.SIGHUP)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert output.splitlines()[-1] == f"{int(signal.SIGTERM)} [0, 0]"  # not that the second killed them
    assert all(is_gone(pid) for pid in children)


def test_a_second_signal_kills_at_once() -> None:
    deaf = RANK.replace("sys.exit(0)", "return")
    launcher, children = launch(deaf)
    assert launcher.stdout is not None
    launcher.send_signal(signal.SIGINT)
    assert [launcher.stdout.readline() for _ in range(2)] == ["checkpoint\n"] * 2  # both were told, neither went
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=60)
    assert output.strip() == f"{int(signal.SIGINT)} [-9, -9]"
    assert all(is_gone(pid) for pid in children)


def test_killing_the_launcher_leaves_no_process() -> None:
    launcher, children = launch(RANK)
    launcher.kill()
    launcher.wait()
    await_gone(children)
    assert launcher.stdout is not None
    launcher.stdout.close()


def test_ranks_get_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = local.rank_commands(("python",), ranks=2, threads=3)
    assert (first.env["RANK"], second.env["RANK"]) == ("0", "1")
    assert {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}.items() <= second.env.items()
    assert first.env["MASTER_PORT"] == second.env["MASTER_PORT"]


def test_the_users_own_thread_count_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.thread_limits(2) == {"OMP_NUM_THREADS": "7"}


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert local.num_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.num_gpus() == 0


def test_the_launcher_itself_loads_no_torch() -> None:
    script = "import sys, kdmesh.launch.local; assert not {'torch', 'grpc', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(local.__file__).parents[2])


@pytest.mark.slow
def test_a_rank_that_finds_the_first_one_gone_is_silent_about_it() -> None:
    said: list[str] = []
    command = python("""
        import os, time
        from kdmesh_trainer.mesh import joined
        with joined("cpu", longest_wait_s=10) as mesh:
            if not mesh.is_first:
                gone = mesh.gather(os.getpid())[0]
                while os.path.exists(f"/proc/{gone}"):
                    time.sleep(0.05)
                print(mesh.is_first_to_fail(), flush=True)
            else:
                mesh.gather(os.getpid())
            os._exit(0)
    """)
    with local.Processes() as processes:
        processes.wait(processes.start(*local.rank_commands(command, ranks=2, threads=1, on_line=said.append)))
    assert said == ["False"]
