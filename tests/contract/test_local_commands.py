"""Runs the commands against real services: a probe that passes or fails, two trainers, a clean stop."""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from kdmesh import config
from kdmesh.commands import cli, probe
from kdmesh.launch import jobs, local
from kdmesh.log import is_urgent
from kdmesh_teacher.config import TeacherConfig
from tests.support.tiny_models import TinyModels

KDMESH = (sys.executable, "-c", "from kdmesh.commands.cli import main; main()")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def served(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[torch.dtype, str]]:
    """The address of a teacher server for each element type."""
    directory = tmp_path_factory.mktemp("served")
    addresses = {}
    with local.Processes() as processes:
        for dtype in DTYPES:
            path = teacher_yaml(directory / f"{dtype}.yaml", tiny_models.path(seed=1, dtype=dtype))
            command = jobs.server_command(
                jobs.TEACHER, path, config.load(TeacherConfig, path), threads=1, on_line=lambda line: None
            )
            addresses[dtype] = jobs.start_server(processes, command)
        yield addresses


def teacher_yaml(path: Path, model: Path) -> Path:
    tree = {
        "engine": {"kind": "transformers", "model": str(model), "device": "cpu"},
        "server": {"drain_s": 2},
        "slab": {"slots": 8, "slot_mib": 0.25},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def rollout_yaml(path: Path, model: Path) -> Path:
    tree = {"engine": {"kind": "transformers", "model": str(model), "device": "cpu"}, "server": {"drain_s": 2}}
    path.write_text(yaml.safe_dump(tree))
    return path


def trainer_yaml(directory: Path, model: Path, *, steps: int) -> Path:
    """A trainer of two ranks with its data beside it."""
    chat = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it is said"}]
    (directory / "train.jsonl").write_text(8 * (json.dumps({"messages": chat}) + "\n"))
    tree = {
        "output": str(directory / "run"),
        "steps": steps,
        "ranks": 2,
        "student": {"model": str(model), "device": "cpu"},
        "teacher": {"addresses": []},
        "data": {"train": {"format": "chat", "path": str(directory / "train.jsonl")}, "max_tokens": 64},
        "batch": {"sequences": 4, "max_tokens": 128},
    }
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_probe(address: str, model: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.main, ["probe", "--teacher", address, "--model", str(model), *options])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("door", ["shm", "stream"])
def test_a_probe_of_the_same_model_passes(
    dtype: torch.dtype, door: str, served: dict[torch.dtype, str], tiny_models: TinyModels
) -> None:
    result = run_probe(served[dtype], tiny_models.path(seed=1, dtype=dtype), "--door", door)
    assert result.exit_code == 0, result.output
    sentence, verdict = result.stdout.splitlines()
    assert sentence.startswith("PASS")
    figures = json.loads(verdict)
    assert figures["door"] == door
    assert figures["max_difference_nats"] <= figures["bound_nats"]
    assert figures["num_positions"] > 50


def test_a_probe_of_other_weights_fails_with_the_figure(
    served: dict[torch.dtype, str], tiny_models: TinyModels
) -> None:
    result = run_probe(served[torch.float32], tiny_models.path(seed=2))
    assert result.exit_code == 1
    sentence, verdict = result.stdout.splitlines()
    assert sentence.startswith("FAIL")
    assert "its /v1/model tells what it serves" in sentence
    assert json.loads(verdict)["max_difference_nats"] > 0.1


def test_a_probe_can_be_made_stricter(served: dict[torch.dtype, str], tiny_models: TinyModels) -> None:
    model = tiny_models.path(seed=1, dtype=torch.bfloat16)
    assert run_probe(served[torch.bfloat16], model, "--bound", "1e-9").exit_code == 1


def test_a_probe_takes_prompts_from_a_file(
    served: dict[torch.dtype, str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("def one(): pass\n\nthe second prompt\n")
    (tmp_path / "none.txt").write_text("\n")
    address, model = served[torch.float32], tiny_models.path(seed=1)
    assert run_probe(address, model, "--prompts", str(tmp_path / "prompts.txt")).exit_code == 0
    empty = run_probe(address, model, "--prompts", str(tmp_path / "none.txt"))
    assert empty.exit_code == 2
    assert "has no prompt" in empty.output


def test_a_probe_gives_its_rows_back_before_it_ends(tiny_models: TinyModels, tmp_path: Path) -> None:
    """A session that ends with rows leaves a slot abandoned, as by a client that hangs."""
    model, lines = tiny_models.path(seed=1), list[str]()
    path = teacher_yaml(tmp_path / "teacher.yaml", model)
    with local.Processes() as processes:
        cfg = config.load(TeacherConfig, path)
        address = jobs.start_server(
            processes, jobs.server_command(jobs.TEACHER, path, cfg, threads=1, on_line=lines.append)
        )
        assert '"door": "shm"' in run_probe(address, model).stdout
    events = [json.loads(line) for line in lines if line.startswith("{")]
    (ended,) = [event for event in events if event["event"] == "session ended"]
    assert ended["abandoned_slots"] == 0


def test_a_probe_without_a_teacher_says_so(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_DEADLINE_S", 0.5)
    result = run_probe("127.0.0.1:1", tiny_models.path(seed=1))
    assert result.exit_code == 3
    assert "no teacher" in result.output
    assert "Traceback" not in result.output


class Website(socketserver.BaseRequestHandler):
    """Answers a connection as a server of HTTP/1.1 does that cannot read what it is sent."""

    def handle(self) -> None:
        """Once."""
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def test_a_probe_of_the_rest_port_guesses_so_while_it_waits(tiny_models: TinyModels) -> None:
    command = "from kdmesh.commands import cli; from kdmesh.commands import probe; probe._DEADLINE_S = 5.0; cli.main()"
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Website) as http:
        serving = threading.Thread(target=http.serve_forever)
        serving.start()
        address = f"127.0.0.1:{http.server_address[1]}"
        argv = [sys.executable, "-c", command, "probe", "--teacher", address, "--model", str(tiny_models.path(seed=1))]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        finally:
            http.shutdown()
            serving.join()
    assert done.returncode == 3
    said = "answers, but not gRPC: is it `server.rest_port` instead of `server.port`?"
    waits, *_, refusal = done.stderr.splitlines()
    assert waits.endswith(f"waiting for a server  kind=teacher  address={address}  reason={address} {said}")
    assert refusal == f"Error: no teacher is ready within 5 s ({address}: {said})"


SAMPLED = "{kind: on_policy, samples_per_prompt: 2, sampling: {max_new_tokens: 8}, max_staleness: 1}"


@pytest.mark.parametrize(
    "is_sampled",
    [pytest.param(False, id="off-policy"), pytest.param(True, id="on-policy", marks=pytest.mark.slow)],
)
def test_a_stopped_training_continues_and_leaves_nothing(
    tiny_models: TinyModels, tmp_path: Path, is_sampled: bool
) -> None:
    student = tiny_models.path(seed=3)
    teacher = teacher_yaml(tmp_path / "teacher.yaml", tiny_models.path(seed=1))
    trainer = trainer_yaml(tmp_path, student, steps=100_000)
    argv = [*KDMESH, "train", str(trainer), "--serve", str(teacher), "--set", "trackers=[]"]
    if is_sampled:
        rollout = rollout_yaml(tmp_path / "rollout.yaml", student)
        argv += ["--serve-rollout", str(rollout), "--set", f"source={SAMPLED}"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith(f"Starting the server of {teacher};")
        assert first.rstrip().endswith(f"Its log: {tmp_path / 'run' / 'teacher.log'}")
        line = next(line for line in process.stderr if '"progress"' in line)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(children) == 3 + is_sampled, line
        os.kill(process.pid, signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert not [pid for pid in children if psutil.pid_exists(pid)]

    metrics = tmp_path / "run" / "metrics.jsonl"
    done = [json.loads(text)["step"] for text in metrics.read_text().splitlines()]
    again = subprocess.run([*argv, "--set", f"steps={len(done) + 2}"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [json.loads(text)["step"] for text in metrics.read_text().splitlines()] == list(range(len(done) + 2))
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def test_a_rank_that_refuses_its_data_ends_the_command_with_its_sentence(
    served: dict[torch.dtype, str], tiny_models: TinyModels, tmp_path: Path
) -> None:
    trainer = trainer_yaml(tmp_path, tiny_models.path(seed=3), steps=5)
    (tmp_path / "train.jsonl").write_text('{"messages": [}\n')
    address = f"teacher.addresses=['{served[torch.float32]}']"
    done = subprocess.run([*KDMESH, "train", str(trainer), "--set", address], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    plain = [line for line in done.stderr.splitlines() if is_urgent(line)]
    assert len(plain) == 1
    assert "train.jsonl:1" in plain[0]


def test_a_bad_row_ends_a_run_while_its_teacher_loads(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_yaml(tmp_path / "teacher.yaml", tiny_models.path(seed=1))
    trainer = trainer_yaml(tmp_path, tiny_models.path(seed=3), steps=5)
    good = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(good + '{"message": []}\n')
    loads = local.Command(name="teacher", argv=(sys.executable, "-c", "import time; time.sleep(600)"), on_line=print)
    monkeypatch.setattr(jobs, "server_command", lambda *_, **__: loads)
    result = CliRunner().invoke(cli.main, ["train", str(trainer), "--serve", str(teacher)])
    assert result.exit_code == 2
    first, refusal = result.output.splitlines()
    assert first.startswith(f"Starting the server of {teacher};")
    assert refusal.startswith(f"Error: {tmp_path / 'train.jsonl'}:9: no column 'messages'")


def test_the_data_of_a_run_are_checked_without_a_server(tiny_models: TinyModels, tmp_path: Path) -> None:
    trainer = trainer_yaml(tmp_path, tiny_models.path(seed=3), steps=5)
    held_out = f"data.held_out={{format: chat, path: {tmp_path / 'held.jsonl'}}}"
    check = [*KDMESH, "check", str(trainer), "--data", "--set", held_out]
    (tmp_path / "held.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    for rows, source in ((8, "{kind: off_policy}"), (0, SAMPLED)):
        done = subprocess.run([*check, "--set", f"source={source}"], capture_output=True, text=True)
        assert done.returncode == (0 if rows else 2), done.stderr
        plain = [line for line in (done.stdout + done.stderr).splitlines() if is_urgent(line)]
        told = f"{trainer}: a good trainer configuration" if rows else f"Error: {tmp_path / 'held.jsonl'}:1: "
        assert len(plain) == 1
        assert plain[0].startswith(told)
        (tmp_path / "held.jsonl").write_text('{"messages": []}\n')
    teacher = teacher_yaml(tmp_path / "teacher.yaml", tiny_models.path(seed=1))
    refused = CliRunner().invoke(cli.main, ["check", str(teacher), "--data"])
    assert refused.exit_code == 2
    assert "--data is about a trainer's data" in refused.output
