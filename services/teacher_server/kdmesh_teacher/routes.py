"""What a teacher server shows over HTTP besides health and metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from kdmesh.serving.engine.gate import Gate
from kdmesh_teacher.parts import Parts

Json = dict[str, Any]


def add_routes(app: FastAPI, gate: Gate[Parts]) -> None:
    """The model, its weights, the sessions and the slab."""

    @app.get("/v1/model")
    async def model() -> Json:
        """What is served, and the limits of a request."""
        return asdict(gate.parts().model)

    @app.get("/v1/weights")
    async def weights() -> Json:
        """Which weights are served, and whether new ones are coming or can come."""
        parts = gate.parts()
        state = "frozen" if parts.updates is None else parts.updates.state.value
        return {"version": parts.scheduler.weights.version, "state": state}

    @app.get("/v1/sessions")
    async def sessions() -> Json:
        """Who is connected; never their tokens."""
        return {"sessions": [asdict(session) for session in gate.parts().store.snapshot().sessions]}

    @app.get("/v1/slab")
    async def slab() -> Json:
        """The shared memory and the queue."""
        parts = gate.parts()
        queue = parts.scheduler.queue
        snapshot = asdict(parts.store.snapshot())
        del snapshot["sessions"]
        return snapshot | {
            "limits": asdict(parts.store.limits),
            "waiting": {"requests": queue.num_requests, "tokens": queue.num_tokens},
            "tokens_per_s": parts.scheduler.load.tokens_per_s,
        }

    @app.get("/v1/cache")
    async def cache() -> Json:
        """What is kept of rows, and whether it still grows."""
        parts = gate.parts()
        return {"is_on": False} if parts.cache is None else {"is_on": True} | asdict(parts.cache.state())
