"""HTTP: viewers read, operators change, probes are asked nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import URL
from starlette.requests import Request

from kdmesh.errors import DeadlineExpired, Unavailable
from kdmesh.rpc.retry import Deadline
from tests.support.identities import JOB, OPERATOR, VIEWER, access_with, teacher_client, write_tokens
from tests.support.rollout_server import running_rollout
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import running_teacher

WAKE = {"json": {"tags": ["weights"]}}


@asynccontextmanager
async def guarded(directory: Path, kind: str = "teacher") -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to a server that knows a viewer, a job and an operator."""
    auth = {"tokens": str(write_tokens(directory / "tokens.yaml", VIEWER, JOB, OPERATOR))}
    serving = (
        running_teacher(directory, server={"auth": auth})
        if kind == "teacher"
        else running_rollout(server={"auth": auth})
    )
    async with serving as server, httpx.AsyncClient(base_url=f"http://{server.addresses.rest}") as http:
        yield http


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("kind", ["teacher", "rollout"])
async def test_only_probes_are_asked_nothing(tmp_path: Path, kind: str) -> None:
    async with guarded(tmp_path, kind) as http:
        for path in ("/healthz", "/readyz", "/reachz"):
            assert (await http.get(path)).status_code == 200
        for path in ("/", "/metrics", "/v1/model", "/openapi.json", "/no/such/page", "/healthz/"):
            answer = await http.get(path)
            assert answer.status_code == 401, path
            assert "bearer token" in answer.json()["reason"]
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await http.post("/healthz")).status_code == 401


async def test_a_password_that_is_no_text_opens_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as http:
        for password in (b"\xff\xff", b"no base64", b"/w=="):
            assert (await http.get("/metrics", headers={"Authorization": b"Basic " + password})).status_code == 401


async def test_a_host_header_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(tmp_path) as http:
        # As versions of Starlette that kdmesh takes, too, put a URL together.
        monkeypatch.setattr(
            Request, "url", property(lambda one: URL(f"http://{one.headers['Host']}{one.scope['path']}"))
        )
        assert (await http.get("/v1/sessions", headers={"Host": "any/healthz?"})).status_code == 401


@pytest.mark.parametrize("token", [VIEWER, JOB, OPERATOR])
async def test_who_is_known_may_read_and_only_operators_may_change(tmp_path: Path, token: str) -> None:
    async with guarded(tmp_path) as http:
        for path in ("/metrics", "/v1/model", "/v1/sessions", "/v1/slab", "/v1/weights"):
            assert (await http.get(path, headers=bearer(token))).status_code == 200
        for method, path in (("POST", "/v1/wake"), ("PUT", "/v1/jobs/any"), ("DELETE", "/v1/model")):
            answer = await http.request(method, path, headers=bearer(token), **WAKE)
            if token == OPERATOR:
                assert answer.status_code not in (401, 403)
            else:
                assert answer.status_code == 403
                assert f"{method} {path} needs role operator" in answer.json()["reason"]


async def test_a_wrong_token_is_refused_and_not_repeated(tmp_path: Path) -> None:
    async with guarded(tmp_path) as http:
        answer = await http.get("/metrics", headers=bearer("wrong-token-of-nobody"))
    assert answer.status_code == 401
    assert "wrong-token" not in answer.text


async def test_a_browser_sends_the_token_as_a_password_and_changes_nothing_with_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as http:
        assert (await http.get("/v1/model", auth=("anybody", VIEWER))).status_code == 200
        assert (await http.get("/v1/model", auth=("anybody", "wrong"))).status_code == 401
        assert (await http.get("/v1/model", headers={"Authorization": "Basic ???"})).status_code == 401
        assert (await http.post("/v1/wake", auth=("anybody", OPERATOR), **WAKE)).status_code == 401


async def test_a_job_sheds_its_limits_under_no_other_name_and_an_operator_lifts_them(tmp_path: Path) -> None:
    section = {"auth": {"tokens": str(write_tokens(tmp_path / "tokens.yaml", JOB, OPERATOR))}}
    limits = {"defaults": {"max_requests_per_s": 0.001}}
    wanted = [sequence(9)]
    async with (
        running_teacher(tmp_path, server=section, jobs=limits) as teacher,
        httpx.AsyncClient(base_url=f"http://{teacher.addresses.rest}") as http,
        teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path), job="one") as first,
        teacher_client(teacher.addresses.grpc, access_with(JOB, tmp_path), job="two") as second,
    ):
        await first.prefill(wanted, Deadline.after(10))
        with pytest.raises((Unavailable, DeadlineExpired)):
            await second.prefill(wanted, Deadline.after(0.2))
        for token, status in ((JOB, 403), (OPERATOR, 200)):
            terms = {"max_requests_per_s": None}
            answer = await http.put("/v1/jobs/job-one", headers=bearer(token), json=terms)
            assert answer.status_code == status
        await second.prefill(wanted, Deadline.after(10))
