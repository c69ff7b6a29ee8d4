"""From our configuration to the arguments of the installed SGLang."""

from __future__ import annotations

import os
from typing import Any

from kdmesh.errors import ConfigError
from kdmesh.sglang.config import SglangModel
from kdmesh.types import DType


def server_arguments(config: SglangModel, dtype: DType, *, sees: bool = False) -> dict[str, Any]:
    """Arguments of `sglang.Engine`; sets the environment variables that SGLang reads besides.

    Args:
        sees: whether the model reads images.

    Raises:
        ConfigError: an entry of `arguments` is none of this version's.
    """
    _set_environment(config)
    _check_names(config)
    given = {
        "quantization": config.quantization,
        "mem_fraction_static": config.memory_fraction,
        "context_length": config.context_length,
        "attention_backend": config.attention_backend,
        "dist_init_addr": config.dist_init_address,
    }
    return {
        **(_CPU if config.device == "cpu" else {}),
        **({"enable_multimodal": True} if sees else {}),
        **({"mm_attention_backend": "sdpa"} if sees and config.device == "cpu" else {}),
        **{name: value for name, value in given.items() if value is not None},
        **config.arguments,
        "model_path": str(config.model),
        "dtype": dtype.value,
        "device": config.device,
        "tp_size": config.tensor_parallel,
        "pp_size": config.pipeline_parallel,
        "ep_size": config.expert_parallel,
        "dp_size": config.data_parallel,
        "nnodes": config.num_nodes,
        "node_rank": config.node_rank,
        "trust_remote_code": config.trust_remote_code,
        "chunked_prefill_size": config.chunked_prefill_tokens,
        "disable_radix_cache": not config.prefix_cache,
        "enable_deterministic_inference": config.deterministic and has_deterministic_inference(config),
        "skip_tokenizer_init": True,  # ids go in, and what comes out is no text
        "enable_memory_saver": config.sleep,
        "enable_weights_cpu_backup": config.sleep,  # else they come back as garbage
        "log_level": "warning",
    }


def has_deterministic_inference(config: SglangModel) -> bool:
    """Whether SGLang itself makes rows independent of batching with this attention backend."""
    if config.device == "cpu":
        return False
    from sglang.srt.arg_groups.choices import DETERMINISTIC_ATTENTION_BACKEND_CHOICES

    return config.attention_backend is None or config.attention_backend in DETERMINISTIC_ATTENTION_BACKEND_CHOICES


def num_schedulers(config: SglangModel) -> int:
    """Scheduler processes on this machine."""
    # With attention data parallelism, the copies lie inside the processes of tensor parallelism.
    copies = 1 if config.arguments.get("enable_dp_attention") else config.data_parallel
    return config.tensor_parallel * config.pipeline_parallel * copies // config.num_nodes


_CPU: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "sleep_on_idle": True,  # else it asks for work without pause, on the cores that compute
}


def _set_environment(config: SglangModel) -> None:
    if config.device == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    if config.pipeline_parallel > 1:
        # It would send nothing back for a batch that holds but a part of one prompt.
        os.environ["SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM"] = "0"
    if config.node_rank > 0:
        os.environ["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"  # it would serve a port of its own, for ever


def _check_names(config: SglangModel) -> None:
    import msgspec
    from sglang.srt.server_args import ServerArgs

    known = {field.name for field in msgspec.structs.fields(ServerArgs)}
    unknown = sorted(set(config.arguments) - known)
    if unknown:
        raise ConfigError(f"engine.arguments: this version of SGLang has no argument {', '.join(unknown)}")
