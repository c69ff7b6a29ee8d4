"""What Prometheus reads of a run, over HTTP."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kdmesh.errors import ConfigError
from kdmesh_trainer.reporting import metrics_server
from kdmesh_trainer.reporting.metrics import Metrics
from kdmesh_trainer.reporting.metrics_server import serving
from kdmesh_trainer.reporting.progress import LogProgress
from kdmesh_trainer.reporting.telemetry import RunTelemetry
from kdmesh_trainer.sections.metrics_config import MetricsConfig
from kdmesh_trainer.stats import Scores, StepStats, TeacherFigures
from tests.support.free_port import free_port
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_config
from tests.system.processes import Processes
from tests.system.training import KDMESH

IPV6 = Path("/proc/net/if_inet6")

STATS = StepStats(
    loss_nats_per_token=2.0,
    divergence_nats_per_token=1.5,
    cross_entropy_nats_per_token=None,
    top1_agreement=0.5,
    gradient_norm=1.0,
    learning_rate=1e-3,
    num_loss_tokens=10,
    num_tokens=100,
    teacher_wait_s=0.25,
    teachers={"small": TeacherFigures(tokens=1, loss_tokens=1, wait_s=0.25)},
)


def read(port: int, host: str = "127.0.0.1") -> dict[str, float]:
    """Values by name, and by the labels that are not the job."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"http://{host}:{port}/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("kdmesh_job") == "student-a"
            found[" ".join([sample.name.removeprefix("kdmesh_trainer_"), *labels.values()])] = sample.value
    return found


def test_a_run_that_hangs_in_its_first_step_shows_when_it_began(tmp_path: Path) -> None:
    metrics = Metrics("student-a")  # whose steps follow from its data
    run = RunTelemetry(
        record=tmp_path / "metrics.jsonl",
        progress=LogProgress(every_s=10.0),
        trackers=[],
        metrics=metrics,
        metrics_server=None,
        doors=dict,
        imbalance=lambda: None,
    )
    with serving(MetricsConfig(port=0), metrics.registry) as server:
        run.start(4, 7)
        found = read(server.port)
    run.close()
    assert (found["step"], found["steps_wanted"]) == (4, 7)
    assert time.time() - 60 < found["last_step_timestamp_seconds"] <= time.time()


def test_steps_evaluations_and_doors_are_shown_with_the_jobs_name() -> None:
    metrics = Metrics("student-a", steps=7)
    with serving(MetricsConfig(port=0), metrics.registry) as server:
        assert read(server.port)["not_finite_steps_total"] == 0
        for done in (3, 4):
            metrics.step_done(
                done, STATS, phase_s={"batch": 0.5}, bound_s={"teacher": 0.25, "update": 0.75}, step_s=1.0
            )
        metrics.rows_came({"stream"}, None)
        metrics.rows_came({"shm"}, 1.25)
        scores = Scores(
            kl_nats_per_token=None,
            cross_entropy_nats_per_token=3.0,
            top1_agreement=None,
            num_loss_tokens=1,
            num_sequences=1,
        )
        code = replace(scores, cross_entropy_nats_per_token=4.0)
        metrics.evaluated(replace(scores, datasets={"code": code}), seconds=2.0)
        found = read(server.port)
    assert (found["step"], found["steps_total"], found["steps_wanted"]) == (4, 2, 7)
    assert (found["tokens_total"], found["loss_tokens_total"], found["step_seconds_count"]) == (200, 20, 2)
    assert (found["loss_nats_per_token"], found["divergence_nats_per_token"]) == (2.0, 1.5)
    assert (found["bound_seconds_total teacher"], found["bound_seconds_total update"]) == (0.5, 1.5)
    assert (found["phase_seconds_total batch"], found["phase_seconds_total evaluate"]) == (1.0, 2.0)
    assert found["teacher_wait_seconds_total small"] == 0.5
    assert (found["held_out_cross_entropy_nats_per_token"], found["teacher_imbalance"]) == (3.0, 1.25)
    assert found["held_out_dataset_cross_entropy_nats_per_token code"] == 4.0
    assert found["door shm"] == 1
    assert not found.keys() & {"door stream", "cross_entropy_nats_per_token", "held_out_kl_nats_per_token"}


def test_a_figure_that_is_not_known_any_more_keeps_its_last_value() -> None:
    metrics = Metrics("student-a", steps=7)
    for stats in (STATS, replace(STATS, top1_agreement=None)):
        metrics.step_done(1, stats, phase_s={}, bound_s={}, step_s=1.0)
    with serving(MetricsConfig(port=0), metrics.registry) as server:
        assert read(server.port)["top1_agreement"] == 0.5


@pytest.mark.skipif(not IPV6.exists() or f"{1:032x}" not in IPV6.read_text(), reason="there is no IPv6 here")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_who_has_ipv6_reads_too(host: str) -> None:
    with serving(MetricsConfig(port=0, host=host), Metrics("student-a", steps=7).registry) as server:
        assert read(server.port, "[::1]")["steps_wanted"] == 7


def test_a_port_that_is_taken_is_named() -> None:
    metrics = Metrics("student-a", steps=7)
    with serving(MetricsConfig(port=0), metrics.registry) as server:
        taken = MetricsConfig(port=server.port)
        with (
            pytest.raises(ConfigError, match=f"metrics: cannot listen on 127.0.0.1:{server.port}"),
            serving(taken, Metrics("student-b", steps=7).registry),
        ):
            pass


def test_the_end_waits_for_a_reading_that_began_after_it() -> None:
    metrics = Metrics("student-a", steps=7)
    with (
        serving(MetricsConfig(port=0, linger_s=60), metrics.registry) as server,
        ThreadPoolExecutor() as pool,
    ):
        read(server.port)
        metrics.not_finite()
        waits = threading.Thread(target=server.await_reading)
        waits.start()
        while waits.is_alive():
            found = pool.submit(read, server.port).result()
        assert found["not_finite_steps_total"] == 1


def test_who_accepts_a_version_that_is_none_reads_text(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(MetricsConfig(port=0), Metrics("student-a", steps=7).registry) as server:
        headers = {"Accept": "application/openmetrics-text;version=one"}
        answer = httpx.get(f"http://127.0.0.1:{server.port}/metrics", headers=headers)
        assert (answer.status_code, "steps_wanted" in answer.text) == (200, True)
    assert capfd.readouterr().err == ""


def test_the_end_does_not_wait_for_a_reader_that_dribbles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_LONGEST_S", 0.5)
    has_ended = threading.Event()
    with ThreadPoolExecutor() as pool:
        with serving(MetricsConfig(port=0), Metrics("student-a", steps=7).registry) as server:
            reader = socket.create_connection(("127.0.0.1", server.port))
            reader.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            is_let_go = pool.submit(dribble, reader, has_ended)
        has_ended.set()
        assert is_let_go.result()


def dribble(reader: socket.socket, has_ended: threading.Event) -> bool:
    """Whether it was hung up on before the end, which is waited for in vain otherwise."""
    with reader:
        for _ in range(200):
            try:
                reader.sendall(b"a")
            except OSError:
                return True
            if has_ended.wait(0.05):
                return True
    return False


@pytest.mark.slow
def test_ranks_of_a_run_whose_loss_is_not_finite_stay_until_that_was_read(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    port = free_port()
    config = write_config(
        tmp_path,
        student=tiny_models.path("qwen3", seed=1),
        teacher=None,
        steps=9,
        objective={"name": "sft"},
        optimizer={"learning_rate": 1e30, "schedule": "constant", "max_gradient_norm": None},
        metrics={"port": port, "linger_s": 100},
        output=str(tmp_path / "student-a"),
        ranks=2,
    )
    with Processes() as processes:
        # It ends the other ranks as soon as one has ended.
        run = processes.start("train", tmp_path, KDMESH, "train", str(config))
        run.until(lambda: is_shown(port) and read(port)["not_finite_steps_total"])
        assert run.exit_code() == 2
        assert [line for line in run.words() if "must be finite" in line]
        assert not run.events("nobody read the metrics at the end")


def is_shown(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
