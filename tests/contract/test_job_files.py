"""Terms of jobs in a file of their own, which changes while the server runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from kdmesh.errors import ConfigError
from tests.support.rollout_server import running_rollout
from tests.support.teacher_server import running_teacher


def write(path: Path, **overrides: dict[str, Any]) -> None:
    """Put another file in its place, as the kubelet does."""
    lines = [f"  {name}: {terms}" for name, terms in overrides.items()]
    new = path.with_suffix(".new")
    new.write_text("\n".join(["overrides:" if lines else "overrides: {}", *lines]), encoding="utf-8")
    new.rename(path)


async def weight_of(rest: str, job: str) -> float:
    async with httpx.AsyncClient() as http:
        weight: float = (await http.get(f"http://{rest}/v1/jobs/{job}")).json()["terms"]["weight"]
    return weight


async def metrics_of(rest: str) -> str:
    async with httpx.AsyncClient() as http:
        return (await http.get(f"http://{rest}/metrics")).text


async def test_a_teacher_takes_the_terms_that_its_file_says_now(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    write(path, production={"weight": 4})
    jobs = {"file": str(path), "overrides": {"production": {"weight": 2}, "nightly": {"weight": 0.5}}}
    async with running_teacher(tmp_path, jobs=jobs) as teacher:
        rest = teacher.addresses.rest
        assert [await weight_of(rest, job) for job in ("production", "nightly", "other")] == [4, 0.5, 1]
        write(path, other={"weight": 3})
        assert [await weight_of(rest, job) for job in ("production", "nightly", "other")] == [2, 0.5, 3]


async def test_a_rollout_server_takes_the_terms_that_its_file_says_now(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    write(path)
    async with running_rollout(jobs={"file": str(path)}) as server:
        write(path, production={"weight": 4})
        assert await weight_of(server.addresses.rest, "production") == 4


async def test_a_broken_file_of_jobs_leaves_what_it_said_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "jobs.yaml"
    write(path, production={"weight": 4})
    async with running_teacher(tmp_path, jobs={"file": str(path)}) as teacher:
        rest = teacher.addresses.rest
        at_first = await metrics_of(rest)
        with caplog.at_level(logging.ERROR):
            write(path, production={"wait": 4})
            assert await weight_of(rest, "production") == 4
        said = await metrics_of(rest)
    assert 'kdmesh_teacher_unusable_files_total{key="jobs"} 0.0' in at_first
    assert 'kdmesh_teacher_unusable_files_total{key="jobs"} 1.0' in said
    (record,) = [record for record in caplog.records if record.name == "kdmesh.auth.watched"]
    assert "overrides.production.wait: there is no such key" in record.__dict__["reason"]


async def test_a_server_does_not_start_with_a_file_of_jobs_that_it_cannot_use(tmp_path: Path) -> None:
    write(tmp_path / "jobs.yaml", production={"weight": -1})
    with pytest.raises(ConfigError, match=r"overrides\.production\.weight"):
        async with running_teacher(tmp_path, jobs={"file": str(tmp_path / "jobs.yaml")}):
            pass
