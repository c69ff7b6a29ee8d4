"""What a rollout server shows over HTTP besides health and metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from kdmesh.serving.engine.gate import Gate
from kdmesh_rollout.parts import Parts

Json = dict[str, Any]


def add_routes(app: FastAPI, gate: Gate[Parts]) -> None:
    """The model and the queue."""

    @app.get("/v1/model")
    async def model() -> Json:
        """What is served, with the version of its weights, and the limits of a request."""
        return asdict(gate.parts().model)

    @app.get("/v1/queue")
    async def queue() -> Json:
        """What is decoded, what waits, and whether new weights are coming."""
        parts = gate.parts()
        waiting = parts.scheduler.queue
        return {
            "running": parts.scheduler.num_running,
            "waiting": {"samples": waiting.num_requests, "tokens": waiting.num_tokens},
            "tokens_per_s": parts.scheduler.tokens_per_s,
            "weights": {"version": parts.updates.version, "state": parts.updates.state.value},
        }
