"""What a teacher server changes in SGLang's scheduler processes: hidden states go to shared memory.

Functions of SGLang get a hook, by its own hook registry; none is replaced:

  _append_prefill_hidden_states   called once per chunk of a prompt, with the chunk's rows still on the device. Ours
                                  selects the wanted ones, copies them to the segment, and leaves a count.
  _compute_max_prefix_len         how much of a prompt may come out of the prefix cache. Ours ends that at the first
                                  wanted row, which is not in the cache: it keeps keys and values, not hidden states.
  Scheduler.__init__              afterwards the process reports to the server.

In a pipeline the rows are taken elsewhere, and two more have one: see sglang_pipeline.py. So have two for what layers
give: see layers.py.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from kdmesh.sglang.report import report
from kdmesh.sglang.segments import Segments
from kdmesh.sglang.staged_weights import SEGMENTS
from kdmesh_teacher.sglang import layers, pipeline
from kdmesh_teacher.sglang.ask import Ask
from kdmesh_teacher.sglang.rows import NO_OUTPUTS, RowProgress

_APPEND = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    "._append_prefill_hidden_states"
)
_MAX_PREFIX = "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len"
_STARTED = "sglang.srt.managers.scheduler.Scheduler.__init__"


def install(socket_path: str) -> None:
    """Register the hooks, which SGLang applies after this."""
    targets = (
        _APPEND,
        _MAX_PREFIX,
        _STARTED,
        pipeline.PREPARE,
        pipeline.RECEIVE,
        layers.RUN,
        layers.CAN_RUN_GRAPH,
    )
    originals = {target: pkgutil.resolve_name(target) for target in targets}
    rows = _Rows(SEGMENTS)
    HookRegistry.register(_APPEND, rows.append, HookType.AROUND)
    HookRegistry.register(pipeline.PREPARE, pipeline.counting(rows.take), HookType.AROUND)
    HookRegistry.register(pipeline.RECEIVE, pipeline.receive, HookType.AROUND)
    outputs = layers.LayerOutputs()
    HookRegistry.register(layers.RUN, outputs.run, HookType.AROUND)
    HookRegistry.register(layers.CAN_RUN_GRAPH, outputs.can_run_graph, HookType.AROUND)
    HookRegistry.register(_MAX_PREFIX, _max_prefix, HookType.AROUND)
    HookRegistry.register(_STARTED, partial(_report, socket_path, originals), HookType.AFTER)


class _Rows:
    """Takes the hidden states of every chunk."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._under_way: WeakKeyDictionary[Any, RowProgress] = WeakKeyDictionary()

    def append(
        self,
        original: Callable[..., int],
        processor: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        capture_hidden_mode: Any,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        """Write a chunk's wanted rows; returns where the next request's rows begin.

        `store` is false for all chunks but the last, and all of them count.
        """
        progress = self._progress(req)
        if progress is None or not capture_hidden_mode.is_full():
            return original(
                processor,
                req=req,
                logits_output=logits_output,
                hidden_state_offset=hidden_state_offset,
                capture_hidden_mode=capture_hidden_mode,
                extend_input_len=extend_input_len,
                store=store,
            )
        end = hidden_state_offset + extend_input_len
        chunk = logits_output.hidden_states[hidden_state_offset:end]
        if pipeline.is_pipeline():
            counts = chunk[0].tolist()
        else:
            outputs = layers.taken_of(logits_output, hidden_state_offset, end)
            counts = list(map(float, self.take(req, chunk, outputs)))
        if store:
            # SGLang hands this list back with the answer, cut to the number of new tokens: one.
            req.hidden_states.append(counts)
        return end

    def take(self, req: Any, chunk_TD: Tensor, outputs: Mapping[int, Tensor] = NO_OUTPUTS) -> tuple[int, int]:
        """Write what is wanted of a chunk's rows; rows written of the request, and tokens seen of it, so far."""
        progress = self._progress(req)
        if progress is None:
            return 0, 0
        progress.take(chunk_TD, outputs)
        return progress.num_written, progress.position

    def _progress(self, req: Any) -> RowProgress | None:
        if req in self._under_way:
            return self._under_way[req]
        ask = Ask.from_params(req.sampling_params.custom_params)
        if ask is None:
            return None
        # What the cache had is not computed, so the first chunk begins behind it.
        progress = RowProgress(ask, self._segments, position=req.cached_tokens)
        self._under_way[req] = progress
        return progress


def _max_prefix(original: Callable[[Any, int], int], req: Any, input_len: int) -> int:
    most = original(req, input_len)
    params = req.sampling_params.custom_params
    if params is None or "kdmesh_first_computed" not in params:
        return most
    return min(most, int(params["kdmesh_first_computed"]))


def _report(socket_path: str, originals: dict[str, object], result: None, scheduler: Any, *_: Any, **__: Any) -> None:
    """Tell the server that this process is there, and follow it from now on."""
    parallel = get_parallel()
    # Of the ranks that compute the same rows, one writes; a pipeline has them in its last stage.
    is_last = parallel.pp_rank == parallel.pp_size - 1
    writes = is_last and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
    SEGMENTS.follow(report(socket_path, originals, writes=writes))
