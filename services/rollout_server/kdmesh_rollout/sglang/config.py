"""Everything the rollout server's SGLang engine can be told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kdmesh.sglang.config import SglangModel

# Of SGLang's arguments, those that this server decides.
_DECIDED = {
    "custom_weight_loader": "the server decides it",
    "weight_version": "the server decides it",
    "max_running_requests": "set engine.max_running instead",
    "speculative_algorithm": "a drafted token has no log-probability here",
    # SGLang 0.5.23 notices that a copy is done only while it is not paused, and refuses new weights until it has.
    "enable_hierarchical_cache": "new weights would be refused while it copies prefixes to the host",
}


class SglangEngine(SglangModel):
    """Samples from the student in SGLang, over one or more GPUs."""

    pipeline_parallel: Literal[1] = 1
    """Stages the layers are cut into: one."""

    data_parallel: Literal[1] = 1
    """Copies of the model: one, because SGLang takes new weights into one. Start several servers instead."""

    num_nodes: Literal[1] = 1
    """Machines: one, because new weights reach SGLang through its memory."""

    max_running: int = Field(256, ge=1)
    """Samples that SGLang has at a time; what its KV cache has no room for waits there."""

    self_probe: bool = True
    """At start, compare the log-probabilities of a few samples with those of Hugging Face transformers, if the model
    fits in this machine's free memory a second time; else with those that SGLang gives the same tokens as a prompt."""

    @model_validator(mode="after")
    def _check_decided(self) -> Self:
        for name in sorted(_DECIDED.keys() & self.arguments):
            raise ValueError(f"arguments: {name} cannot be given; {_DECIDED[name]}")
        return self
