"""The chart's rules and dashboards, asked of a Prometheus that reads two teachers, a rollout server and three jobs."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kdmesh.auth.config import AccessConfig, ClientTlsConfig
from kdmesh.errors import DeadlineExpired, Unavailable
from kdmesh.rpc.teachers.pool import TeacherPool
from tests.observability.monitoring import Prometheus, Webhook, webhook
from tests.support import promql
from tests.support.certificates import CertificateAuthority
from tests.support.free_port import free_port
from tests.support.teacher_requests import sequence
from tests.support.trainer_jobs import write_questions
from tests.system.conftest import Materials
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = [pytest.mark.observability, pytest.mark.timeout(900)]

GREEDY = {"jobs": {"overrides": {"greedy": {"max_requests_per_s": 0.01}}}}
# Of what does not happen here.
NOT_SHOWN = {
    "kdmesh_trainer_teacher_age_steps",
    "kdmesh_trainer_aligned_fraction",
    "kdmesh_trainer_dataset_sequences_total",
    "kdmesh_teacher_weights_updated_timestamp_seconds",
    "kdmesh_teacher_refused_callers_total",
    "kdmesh_rollout_refused_callers_total",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is watched, and by whom."""

    teachers: tuple[Teacher, Teacher]
    broken: Job  # its loss will not be finite
    prometheus: Prometheus
    told: Webhook


@pytest.fixture(scope="module")
def watched(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    authority = CertificateAuthority(root)
    pair = authority.issue("server", ["localhost"])
    tls = {"tls": {"cert": str(pair.cert), "key": str(pair.key)}}
    ports = [free_port() for _ in range(3)]
    with Processes() as processes, webhook() as told:
        first, second = (
            Teacher(
                processes,
                root / name,
                materials.teacher,
                server=tls,
                cache={"memory_mib": 4},
                queue={"max_wait_s": 1},
                **GREEDY,
            )
            for name in ("first", "second")
        )
        # Whoever waits there already is refused.
        rollouts = Rollouts(processes, root / "rollouts", materials.plain.student, server=tls, queue={"max_tokens": 1})
        on_policy, panel, broken = jobs(processes, root, materials, (first, second), rollouts, ports)
        servers = (first, second, rollouts)
        for server in servers:
            server.start()
        encrypted = {"scheme": "https", "tls_config": {"ca_file": str(authority.cert)}}
        prometheus = Prometheus(
            processes,
            root / "prometheus",
            [
                {**scrape("teacher", first.rest, second.rest), **encrypted},
                {**scrape("rollout", rollouts.rest), **encrypted},
                scrape("trainer", *(f"http://127.0.0.1:{port}" for port in ports)),
            ],
            told.url,
        )
        for server in servers:
            server.wait_ready()
        for job in (on_policy, panel):
            job.start()
        ask_too_much(first.address, access=AccessConfig(tls=ClientTlsConfig(ca=authority.cert)))
        yield Watched(teachers=(first, second), broken=broken, prometheus=prometheus, told=told)


def jobs(
    processes: Processes,
    root: Path,
    materials: Materials,
    teachers: tuple[Teacher, Teacher],
    rollouts: Rollouts,
    ports: list[int],
) -> tuple[Job, Job, Job]:
    """One that learns from its own samples, of two turns, also by a layer, with questions; one of two teachers; one
    that explodes."""
    access = {"tls": {"ca": str(root / "authority.crt")}}
    addresses = [teacher.address for teacher in teachers]
    endless: dict[str, Any] = {
        "steps": 100_000,
        "evaluation": {"every": 3, "max_sequences": 2},
        "checkpoint": {"every": 20},
    }
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": [rollouts.address], "access": access, "deadline_s": 100},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 8},
        "judge": {"name": "match", "match": {"name": "exact"}, "wrong": 0.5},
        "environment": {"respond": "tests.system.environments:endless", "max_turns": 2},
    }
    questions = {
        "path": str(write_questions(root / "questions.jsonl", 2, seed=3)),
        "sampling": {"max_new_tokens": 4, "temperature": 1},
        "samples": 2,
        "pass_at": [2],
    }
    on_policy = Job(
        processes,
        root / "on-policy",
        replace(
            materials.plain,
            objective={**materials.plain.objective, "layers": {"pairs": {1: 1}, "weight": 1}},
            is_judged=True,
        ),
        *addresses,
        teacher={"access": access},
        source=source,
        metrics={"port": ports[0]},
        **{**endless, "evaluation": {**endless["evaluation"], "questions": questions}},
    )
    panel = Job(
        processes,
        root / "panel",
        replace(materials.plain, objective={**materials.plain.objective, "teacher_weights": {"one": 1, "two": 1}}),
        teachers={
            name: {"addresses": [address], "access": access, "deadline_s": 100}
            for name, address in zip(("one", "two"), addresses, strict=True)
        },
        metrics={"port": ports[1]},
        data={
            "max_tokens": 96,
            "train": chats(materials, "train"),
            "held_out": {
                "format": "several",
                "datasets": {one: chats(materials, "held_out") for one in ("ours", "theirs")},
            },
        },
        **endless,
    )
    broken = Job(
        processes,
        root / "broken",
        materials.plain,
        objective={"name": "sft"},
        optimizer={"learning_rate": 1e30, "schedule": "constant", "max_gradient_norm": None},
        metrics={"port": ports[2], "linger_s": 100},
    )
    return on_policy, panel, broken


def chats(materials: Materials, name: str) -> dict[str, Any]:
    return {"format": "chat", "path": str(materials.plain.data / f"{name}.jsonl")}


def scrape(job: str, *urls: str) -> dict[str, Any]:
    targets = [url.rpartition("/")[2] for url in urls]
    return {"job_name": job, "static_configs": [{"targets": targets}]}


def ask_too_much(teacher: str, *, access: AccessConfig) -> None:
    """So that it refuses something."""
    with TeacherPool([teacher], job="greedy", deadline_s=5, access=access) as pool:
        for _ in range(2):
            with suppress(Unavailable, DeadlineExpired):
                pool.submit([sequence(9)]).wait()


def test_every_query_of_the_dashboards_and_rules_has_an_answer(watched: Watched) -> None:
    recorded = [(rule["record"], rule["record"]) for rule in promql.rules() if "record" in rule]
    empty = dict([*promql.panel_queries(), *recorded])

    def all_are_answered() -> bool:
        for where, expr in list(empty.items()):
            if watched.prometheus.query(expr):
                del empty[where]
        return not empty

    try:
        watched.prometheus.process.until(all_are_answered, within_s=300)
    except AssertionError:
        assert empty == {}


def test_every_choice_of_the_dashboards_offers_something(watched: Watched) -> None:
    for dashboard in promql.dashboards().values():
        for variable in dashboard["templating"]["list"][1:]:
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match is not None
            series = watched.prometheus.query(match[1])
            assert all(one["metric"][match[2]] for one in series)
            assert series


def test_what_the_services_show_is_what_the_page_of_metrics_says(watched: Watched) -> None:
    shown = {name for name in watched.prometheus.metric_names() if name.startswith("kdmesh_")}
    assert {name for name in shown if not name.endswith("_created")} == promql.known_metrics() - NOT_SHOWN


def test_alertmanager_is_told_of_a_dead_teacher_a_broken_loss_and_a_certificate(watched: Watched) -> None:
    run = watched.broken.start()
    watched.teachers[1].process.signal(signal.SIGKILL)
    wanted = {"KdmeshTeacherDown", "KdmeshLossNotFinite", "KdmeshCertificateExpiring"}
    watched.prometheus.process.until(lambda: wanted <= watched.told.names, within_s=200)
    assert run.exit_code() == 2
