"""SGLang's engine with its processes, as one server runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdmesh.errors import ConfigError, EngineFailure
from kdmesh.handles.slab import named_memory
from kdmesh.handles.slab.runtime_dir import runtime_dir
from kdmesh.models.checkpoint import Checkpoint, open_checkpoint
from kdmesh.models.images.vision import reads_images
from kdmesh.models.placement import DTYPES
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.sglang import shared_files
from kdmesh.sglang.arguments import num_schedulers, server_arguments
from kdmesh.sglang.config import SglangModel
from kdmesh.sglang.schedulers import Schedulers
from kdmesh.sglang.server_death import SERVER_VARIABLE
from kdmesh.sglang.surroundings import ignore_its_signal, surroundings
from kdmesh.sglang.verified_images import images_refusal
from kdmesh.sglang.versions import require_tested_version
from kdmesh.types import DType

T = TypeVar("T")

# They have reported before SGLang says that it is ready.
_REPORT_S = 10.0

# Of the inputs that linear attention keeps; unless it is set, SGLang rounds those of every model to bfloat16.
_CONV_DTYPE = "SGLANG_MAMBA_CONV_DTYPE"


class SglangRuntime:
    """One `sglang.Engine`, used from the thread that starts it.

    Attributes:
        checkpoint: of the model.
        dtype: of the activations.
        engine: the `sglang.Engine`.
        schedulers: its scheduler processes.
        loop: where its coroutines run.
    """

    def __init__(self, config: SglangModel, *, socket_variable: str, arguments: Mapping[str, Any]) -> None:
        """
        Args:
            config: of the model.
            socket_variable: of the environment, by which the server's own plugin finds the server.
            arguments: of `sglang.Engine`; they go before those that follow from `config`.
        """
        self.checkpoint: Checkpoint
        self.dtype: DType
        self.engine: Any = None
        self.schedulers: Schedulers
        self.loop: asyncio.AbstractEventLoop
        self._config = config
        self._socket_variable = socket_variable
        self._arguments = arguments
        self._stack = contextlib.ExitStack()
        self._shared_files: Iterable[Path] = ()
        self._death: asyncio.Future[str]
        self._reason: str | None = None  # why it is dead
        self._on_death: Callable[[str], None] = lambda reason: None
        ignore_its_signal()

    def start(self) -> None:
        """Start SGLang's processes; with node_rank above 0, stay until they end.

        Raises:
            ConfigError: the model, or an argument, is not SGLang's.
            EngineFailure: a process did not report, or node_rank is above 0 and one has ended.
        """
        config = self._config
        if (refusal := images_refusal(config.model)) is not None:
            raise ConfigError(refusal)
        require_tested_version()
        self.checkpoint = open_checkpoint(config.model, trust_remote_code=config.trust_remote_code)
        dtype = self.checkpoint.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        if dtype not in DTYPES:
            raise ConfigError(f"{config.model} has weights of {dtype}; set engine.dtype to bfloat16")
        self.dtype = DTYPES[dtype]
        directory = self._stack.enter_context(runtime_dir(None)).path
        self._stack.callback(self._end_processes)  # before the directory goes that notes what they leave
        self.schedulers = Schedulers(directory / "schedulers.sock")
        self._stack.callback(self.schedulers.close)
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self._death = self.loop.create_future()
        variables = {self._socket_variable: str(self.schedulers.socket_path), SERVER_VARIABLE: str(os.getpid())}
        if _CONV_DTYPE not in os.environ:
            variables[_CONV_DTYPE] = self.dtype.value
        with surroundings(directory=str(directory), variables=variables):
            self._start_engine()
        self.schedulers.wait_reports(num_schedulers(config), _REPORT_S)
        self._shared_files = shared_files.mapped_by(self.schedulers.pids)  # while they live
        named_memory.note(directory, self._shared_files)
        # One that hands requests out need not be the schedulers' parent, with which they would die.
        others = set(self.engine.get_all_child_pids()).difference(self.schedulers.pids)
        self.schedulers.watch(self._died, others)
        if config.node_rank > 0:
            raise EngineFailure(self.loop.run_until_complete(self._death))

    @property
    def max_input_tokens(self) -> int:
        """Most tokens of a prompt, and of a prompt with its response.

        SGLang 0.5.23 takes prompts that it then never starts: its KV cache must have a page to spare for each, behind
        their last one, which may be nearly empty.
        """
        from sglang.srt.runtime_context import get_schedule

        told: dict[str, int] = self.engine._scheduler_init_result.scheduler_infos[0]
        page_size: int = get_schedule().page_size
        return min(told["max_req_input_len"], told["max_total_num_tokens"] - 2 * page_size)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns or raises. Blocks. Raises EngineFailure when a scheduler dies meanwhile."""
        return self.loop.run_until_complete(self._unless_dead(call))

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call `on_death`, from any thread, when a scheduler dies, or at once when one has died."""
        self._on_death = on_death
        if self._reason is not None:
            on_death(self._reason)

    def close(self) -> None:
        """Kill SGLang's processes, all of which are this process's children, and remove what they leave."""
        self._stack.close()

    def _start_engine(self) -> None:
        # Not at the top: the environment must be set before.
        from sglang.srt.entrypoints.engine import Engine

        arguments = server_arguments(self._config, self.dtype, sees=reads_images(self.checkpoint.skeleton.config))
        try:
            self.engine = Engine(**arguments | dict(self._arguments))
        except Exception as error:
            raise ConfigError(f"SGLang did not start: {type(error).__name__}: {error}") from error

    def _end_processes(self) -> None:
        from sglang.srt.utils import kill_process_tree

        if self.engine is not None:
            self.engine.shutdown()
        else:
            kill_process_tree(os.getpid(), include_parent=False)
        shared_files.remove(self._shared_files)

    async def _unless_dead(self, call: Coroutine[Any, Any, T]) -> T:
        running = asyncio.ensure_future(call)
        await asyncio.wait((running, self._death), return_when=asyncio.FIRST_COMPLETED)
        if self._death.done():
            running.cancel()
            raise EngineFailure(self._death.result())
        return running.result()

    def _died(self, reason: str) -> None:
        self._reason = reason
        self._on_death(reason)  # first: whoever then sees a call fail knows why
        self.loop.call_soon_threadsafe(self._death.set_result, reason)


def restart_limits(config: SglangModel) -> RestartLimits:
    """How often it may be started again."""
    restarts = config.max_restarts if config.on_death == "restart" else 0
    return RestartLimits(restarts=restarts, window_s=config.restart_window_s)
