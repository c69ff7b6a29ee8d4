"""Everything the teacher's SGLang engine can be told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kdmesh.sglang.config import SglangModel


class SglangEngine(SglangModel):
    """Runs the teacher in SGLang, over one or more GPUs."""

    max_batch_tokens: int = Field(65536, ge=16)
    """Tokens handed to SGLang together, over all requests of a batch."""

    self_probe: bool = True
    """At start, compare rows and distributions of fixed sequences with those of Hugging Face transformers, if the
    model fits in this machine's free memory a second time; else with its first start, whose rows are kept in the
    user's cache directory. A coarse quantization is further off than is allowed."""

    on_death: Literal["exit", "restart"] = "exit"
    """What the server does when a process of SGLang dies: end, so that whoever started it starts it again; or start
    SGLang again itself, while it is not ready and clients wait or go elsewhere."""

    max_restarts: int = Field(3, ge=1)
    """With on_death restart: so many within restart_window_s, and the next death ends the server."""

    restart_window_s: float = Field(3600.0, gt=0)
    """See max_restarts."""

    @model_validator(mode="after")
    def _restarts_alone(self) -> Self:
        if self.on_death == "restart" and self.num_nodes > 1:
            raise ValueError(
                f"on_death restart needs num_nodes 1, not {self.num_nodes}: the servers of several nodes start together"
            )
        return self
