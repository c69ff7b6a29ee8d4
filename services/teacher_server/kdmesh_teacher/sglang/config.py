"""Everything the teacher's SGLang engine can be told."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kdmesh.sglang.config import SglangModel

# Of SGLang's arguments, those with which rows would be something else.
_DECIDED = {
    # SGLang 0.5.23 answers what it captures for a draft model in the place of final hidden states, of every request.
    "enable_return_aux_hidden_states": "rows would be outputs of layers alone; jobs ask for those by objective.layers",
    "speculative_algorithm": "a teacher decodes nothing, and rows may be what a draft model reads",
}

# What of SGLang's parts a batch, so that a process has not all tokens of it, or not the same as its like.
_PARTING = (
    "attn_cp_size",
    "attn_dp_size",
    "dwdp_size",
    "enable_dp_attention",
    "enable_pdmux",
    "enable_prefill_cp",
    "enable_two_batch_overlap",
    "moe_dp_size",
)


class SglangEngine(SglangModel):
    """Runs the teacher in SGLang, over one or more GPUs."""

    max_batch_tokens: int = Field(65536, ge=16)
    """Tokens handed to SGLang together, over all requests of a batch."""

    updatable: bool = False
    """Let an operator replace the weights while it serves, as a trainer does whose student is also its teacher."""

    self_probe: bool = True
    """At start, compare rows and distributions of fixed sequences with those of Hugging Face transformers, if the
    model fits in this machine's free memory a second time; else with its first start, whose rows are kept in the
    user's cache directory. A coarse quantization is further off than is allowed. Outputs of layers are given where
    they were compared with transformers too, and are the same."""

    @property
    def layers_refusal(self) -> str:
        """Why outputs of layers cannot be asked for; empty: they can, where the start finds them right."""
        if self.pipeline_parallel > 1:
            return f"engine.pipeline_parallel is {self.pipeline_parallel}, and its last stage has not all layers"
        if not self.self_probe:
            return "engine.self_probe is false, and nothing else says whether they are right"
        for name in _PARTING:
            given = self.arguments.get(name)
            if given is True or (given or 1) != 1:
                return f"engine.arguments has {name}, with which a process has not all tokens of a batch"
        return ""

    @model_validator(mode="after")
    def _check_decided(self) -> Self:
        for name in sorted(_DECIDED.keys() & self.arguments):
            raise ValueError(f"arguments: {name} cannot be given; {_DECIDED[name]}")
        return self

    @model_validator(mode="after")
    def _check_updatable(self) -> Self:
        if not self.updatable:
            return self
        for name in ("pipeline_parallel", "data_parallel", "num_nodes"):
            if (size := getattr(self, name)) > 1:
                raise ValueError(f"updatable needs {name} 1, not {size}: new weights reach one model on one machine")
        if self.quantization is not None:
            raise ValueError(f"updatable needs weights that are not quantized; quantization is {self.quantization}")
        if self.on_death == "restart":
            raise ValueError(
                "updatable needs on_death exit: SGLang starts again with the weights of its files, not with the newest"
            )
        if "custom_weight_loader" in self.arguments:
            raise ValueError("arguments: custom_weight_loader cannot be given with updatable; the server decides it")
        return self
