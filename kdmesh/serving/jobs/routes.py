"""The jobs of a server over HTTP: what each takes, and, for an operator, what it may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from fastapi import Body, FastAPI
from pydantic import ValidationError

from kdmesh.config import problems
from kdmesh.errors import InvalidRequest
from kdmesh.serving.jobs.state import JobState
from kdmesh.serving.jobs.table import JobTable, check_name

Json = dict[str, Any]


class Shared(Protocol):
    """A server that jobs share."""

    @property
    def jobs(self) -> JobTable[Any]:
        """What each may take."""
        ...

    def job_states(self, only: str | None = None) -> Sequence[JobState]:
        """Of every job that is known, or of one."""
        ...


def add_job_routes(app: FastAPI, shared: Callable[[], Shared]) -> None:
    """See them, and change their terms until the server ends. `shared` raises Unavailable while the model loads."""

    @app.get("/v1/jobs")
    async def jobs() -> Json:
        """Every job that is known, and what one may take that has no terms of its own."""
        server = shared()
        server.jobs.look_again()
        return {
            "defaults": server.jobs.defaults.model_dump(mode="json"),
            "jobs": [asdict(state) for state in server.job_states()],
        }

    @app.get("/v1/jobs/{job:path}")
    async def one_job(job: str) -> Json:
        """One job, known or not."""
        server = shared()
        server.jobs.look_again()
        return _only(server, job)

    @app.put("/v1/jobs/{job:path}")
    async def override(job: str, terms: Json = Body()) -> Json:  # noqa: B008 - how FastAPI is told
        """Terms of its own from now on, in place of those that it had; what is left out is that of the defaults."""
        server = shared()
        check_name(job)
        kind = type(server.jobs.defaults)
        try:
            server.jobs.override(job, kind.model_validate(terms))
        except ValidationError as error:
            raise InvalidRequest("; ".join(problems(error, terms, kind))) from None
        return _only(server, job)

    @app.delete("/v1/jobs/{job:path}")
    async def reset(job: str) -> Json:
        """What the configuration and `jobs.file` say of it, from now on."""
        server = shared()
        server.jobs.reset(job)
        return _only(server, job)


def _only(server: Shared, job: str) -> Json:
    (state,) = server.job_states(job)
    return asdict(state)
