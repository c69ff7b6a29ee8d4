"""What every SGLang engine can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kdmesh.config import StrictModel

# What a member or the server itself decides, and so cannot come as one of `arguments`.
_DECIDED = {
    "model_path": "model",
    "dtype": "dtype",
    "device": "device",
    "tp_size": "tensor_parallel",
    "pp_size": "pipeline_parallel",
    "ep_size": "expert_parallel",
    "dp_size": "data_parallel",
    "nnodes": "num_nodes",
    "node_rank": "node_rank",
    "dist_init_addr": "dist_init_address",
    "quantization": "quantization",
    "mem_fraction_static": "memory_fraction",
    "context_length": "context_length",
    "attention_backend": "attention_backend",
    "trust_remote_code": "trust_remote_code",
    "chunked_prefill_size": "chunked_prefill_tokens",
    "disable_radix_cache": "prefix_cache",
    "enable_deterministic_inference": "deterministic",
    "enable_memory_saver": "sleep",
    "enable_weights_cpu_backup": "sleep",
    "enable_return_hidden_states": "",
    "return_hidden_states_mode": "",
    "skip_tokenizer_init": "",
    "disable_overlap_schedule": "",
    "log_level": "",
}


class SglangModel(StrictModel):
    """A model in SGLang, over one or more GPUs; each server's engine adds what it alone needs."""

    kind: Literal["sglang"]

    model: Path
    """Directory of a Hugging Face causal LM, or hf://OWNER/MODEL on the hub."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Element type of the activations, and of what is answered; auto keeps the one the checkpoint names."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for tests: the same engine, slowly."""

    deterministic: bool = False
    """Answers are the same bits whatever else is served: SGLang's deterministic inference where the attention backend
    has it, else one sequence at a time and no prefix reuse. Slower."""

    tensor_parallel: int = Field(1, ge=1)
    """Processes that share every layer."""

    pipeline_parallel: int = Field(1, ge=1)
    """Stages the layers are cut into, each of tensor_parallel processes; all on one machine."""

    expert_parallel: int = Field(1, ge=1)
    """Shares of a mixture's experts, among the processes of tensor_parallel."""

    data_parallel: int = Field(1, ge=1)
    """Whole copies of the model; each takes tensor_parallel processes."""

    num_nodes: int = Field(1, ge=1)
    """Machines that tensor_parallel spans. Each runs this server with the same configuration and its own node_rank."""

    node_rank: int = Field(0, ge=0)
    """0 is the machine that answers; the others only compute, and never become ready."""

    dist_init_address: str | None = None
    """host:port on machine 0 where the processes of several machines meet."""

    quantization: str | None = None
    """A method that SGLang knows, as fp8; unset takes the checkpoint's own."""

    memory_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the device's memory for weights and KV cache; unset lets SGLang decide."""

    context_length: int | None = Field(None, ge=16)
    """Longest sequence; unset takes the model's own limit. SGLang keeps a few tokens of it for itself."""

    attention_backend: str | None = None
    """One that SGLang knows, as fa3 or triton; unset lets SGLang decide."""

    trust_remote_code: bool = False
    """Run Python code that lies in the model's directory."""

    chunked_prefill_tokens: int = Field(8192, ge=16)
    """Tokens computed at once; longer prompts are cut. A multiple of SGLang's page size."""

    prefix_cache: bool = True
    """Keep computed prefixes, so that sequences with the same beginning compute it once."""

    sleep: bool = False
    """Be able to give the GPUs' memory back, for others that share them; needs torch-memory-saver, and as much ordinary
    memory as the weights take."""

    on_death: Literal["exit", "restart"] = "exit"
    """What the server does when a process of SGLang dies: end, so that whoever started it starts it again; or start
    SGLang again itself, while it is not ready and clients wait or go elsewhere."""

    max_restarts: int = Field(3, ge=1)
    """With on_death restart: so many within restart_window_s, and the next death ends the server."""

    restart_window_s: float = Field(3600.0, gt=0)
    """See max_restarts."""

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of SGLang's ServerArgs, by the names that the installed version gives them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in sorted(_DECIDED.keys() & self.arguments):
            instead = f"set engine.{_DECIDED[name]} instead" if _DECIDED[name] else "the server decides it"
            raise ValueError(f"arguments: {name} cannot be given; {instead}")
        if self.on_death == "restart" and self.num_nodes > 1:
            raise ValueError(
                f"on_death restart needs num_nodes 1, not {self.num_nodes}: the servers of several nodes start together"
            )
        if self.sleep and self.device == "cpu":
            raise ValueError("sleep is true, but device is cpu: SGLang can only give a GPU's memory back")
        if self.num_nodes > 1 and self.dist_init_address is None:
            raise ValueError(f"num_nodes is {self.num_nodes}, so dist_init_address must say where they meet")
        if self.node_rank >= self.num_nodes:
            raise ValueError(f"node_rank is {self.node_rank}; with {self.num_nodes} nodes the last is one less")
        if self.tensor_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel {self.expert_parallel} does not divide tensor_parallel {self.tensor_parallel}"
            )
        if self.num_nodes > 1 and self.pipeline_parallel > 1:
            raise ValueError(
                f"pipeline_parallel {self.pipeline_parallel} needs num_nodes 1, not {self.num_nodes}: the last stage "
                "writes into memory of the machine that answers"
            )
        if self.num_nodes > 1 and (self.data_parallel > 1 or self.tensor_parallel % self.num_nodes):
            raise ValueError(
                f"several nodes share one copy of the model: data_parallel must be 1, and tensor_parallel "
                f"{self.tensor_parallel} a multiple of num_nodes {self.num_nodes}"
            )
        return self
