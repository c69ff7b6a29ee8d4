"""A server's status over HTTP: as JSON for programs, as a page for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.http.status import Status
from kdmesh.serving.http.status_page import page

# The page holds names that clients chose. They are escaped; and if they were not, nothing would run.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def add_status_routes(app: FastAPI, gate: Gate[Any], service: str) -> None:
    """`gate` is of `lifecycle.Parts`."""

    def status() -> Status:
        working = gate.parts().working() if gate.is_loaded else None
        return Status(service=service, state=gate.refusal or "ready", working=working)

    @app.get("/v1/status")
    async def as_json() -> dict[str, Any]:
        """Everything that the page shows."""
        return asdict(status())

    @app.get("/", response_class=HTMLResponse)
    async def as_page() -> HTMLResponse:
        """For a browser."""
        return HTMLResponse(page(status()), headers=_HEADERS)
