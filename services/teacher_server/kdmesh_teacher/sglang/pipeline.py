"""Counts of rows on their way from a pipeline's last stage, which has the rows, to its first, which answers.

SGLang sends token ids back around the ring of stages, and nothing of the hidden states. Two of its functions get a
hook; none is replaced:

  _pp_prepare_tensor_dict   what the last stage sends. Ours writes the chunk's rows, and adds their counts.
  _pp_prep_batch_result     what a stage makes of that. Ours leaves the counts where SGLang looks for hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

PREPARE = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin._pp_prepare_tensor_dict"
RECEIVE = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin._pp_prep_batch_result"

_COUNTS = "kdmesh_counts"

Take = Callable[[Any, Tensor], tuple[int, int]]
"""Called with a request and its chunk's rows: rows written of the request, tokens seen of it, so far."""


def counting(take: Take) -> Callable[..., dict[str, Tensor]]:
    """The hook of PREPARE."""

    def prepare(
        original: Callable[..., dict[str, Tensor]], scheduler: Any, result: Any, batch: Any
    ) -> dict[str, Tensor]:
        tensors = original(scheduler, result, batch)
        hidden_TD = None if result.logits_output is None else result.logits_output.hidden_states
        if batch.return_hidden_states and hidden_TD is not None and batch.forward_mode.is_extend():
            chunks = torch.split(hidden_TD, list(batch.extend_lens))
            counts = [take(req, chunk_TD) for req, chunk_TD in zip(batch.reqs, chunks, strict=True)]
            tensors[_COUNTS] = _packed(counts)
        return tensors

    return prepare


def receive(original: Callable[..., Any], scheduler: Any, batch: Any, mb_metadata: Any, pp_outputs: Any) -> Any:
    """The hook of RECEIVE."""
    result = original(scheduler, batch, mb_metadata, pp_outputs)
    if batch.return_hidden_states:
        if result.logits_output is None:
            result.logits_output = LogitsProcessorOutput(next_token_logits=None)
        packed = pp_outputs.tensors.get(_COUNTS)
        if packed is not None:
            number = len(batch.reqs)
            result.logits_output.hidden_states = packed[: 2 * number].view(number, 2)
            result.extend_input_len_per_req = [1] * number  # a row of counts for each
    return result


def is_pipeline() -> bool:
    """Whether counts come in the place of rows."""
    return bool(get_parallel().pp_size > 1)


def _packed(counts: Sequence[tuple[int, int]]) -> Tensor:
    """[2 * requests, and some more] float32.

    SGLang lets each process that shares a layer send a part of what all of them have alike. Only one has written rows,
    so its counts must come whole: tensors that do not divide are not parted.
    """
    flat = torch.tensor(counts, dtype=torch.float32).view(-1)
    padding = (1 - len(flat)) % int(get_parallel().attn_tp_size)
    return torch.nn.functional.pad(flat, (0, padding))
