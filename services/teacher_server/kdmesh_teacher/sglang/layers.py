"""What chosen decoder layers give, inside SGLang's scheduler process.

Two functions of SGLang get a hook, by its own hook registry; none is replaced:

  Scheduler.run_batch                     While it computes a batch that asks for layers, these have a forward hook of
                                          torch. Other batches are computed as if nothing were there.
  PrefillCudaGraphRunner.can_run_graph    Such a batch is replayed from no graph, where torch calls no hook.

SGLang's layers hand on their sum in parts: what the last block added, which the processes of tensor parallelism may
still have to sum, and what was there before. Its own `residual_batch.snapshot` puts a copy of them together. That may
be a collective, so every process of one copy of the model does it, whether or not it writes rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor, nn

from kdmesh_teacher.sglang.ask import layers_asked

RUN = "sglang.srt.managers.scheduler.Scheduler.run_batch"
CAN_RUN_GRAPH = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph"

log = logging.getLogger(__name__)


class LayerOutputs:
    """Taken of the batch that is computed, and left beside its hidden states."""

    def __init__(self) -> None:
        self._is_asked = False
        self._layers: Mapping[int, nn.Module] | None = None

    def run(self, original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The hook of RUN."""
        asked = {layer for req in batch.reqs for layer in layers_asked(req.sampling_params.custom_params)}
        if not asked:
            return original(scheduler, batch, *args, **kwargs)
        layers = self._layers_of(scheduler)
        self._is_asked = True
        try:
            with _captured({number: layers[number] for number in sorted(asked & layers.keys())}) as outputs:
                result = original(scheduler, batch, *args, **kwargs)
        finally:
            self._is_asked = False
        if result.logits_output is not None:
            result.logits_output.kdmesh_layers = outputs  # freed with it
        return result

    def can_run_graph(self, original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
        """The hook of CAN_RUN_GRAPH."""
        return not self._is_asked and original(runner, forward_batch)

    def _layers_of(self, scheduler: Any) -> Mapping[int, nn.Module]:
        if self._layers is None:
            number = scheduler.model_config.hf_text_config.num_hidden_layers
            self._layers = numbered_layers(scheduler.tp_worker.model_runner.model, number)
        return self._layers


def taken_of(logits_output: Any, begin: int, end: int) -> dict[int, Tensor]:
    """By layer, [end - begin, D] the rows of one request's chunk; without the layers whose outputs are not known."""
    outputs: Mapping[int, Tensor] = getattr(logits_output, "kdmesh_layers", {})
    rows = len(logits_output.hidden_states)
    # Other rows than those of the final hidden states would be other tokens' too.
    return {layer: output[begin:end] for layer, output in outputs.items() if len(output) == rows}


def numbered_layers(model: nn.Module, number: int) -> dict[int, nn.Module]:
    """The decoder layers of SGLang's model by their numbers, counted from 1; empty where they are not one row."""
    rows = [
        part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == number and name.rpartition(".")[2] == "layers"
    ]
    return dict(enumerate(rows[0], 1)) if len(rows) == 1 else {}


@contextmanager
def _captured(layers: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Filled, by each forward pass within the context, with [T, D] what these layers give it, before any norm."""
    outputs: dict[int, Tensor] = {}

    def keep(number: int, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        try:
            outputs[number] = _whole(output, [*args, *kwargs.values()])
        except RuntimeError:  # SGLang's, also where it does not implement it; the rows are then too few, and refused
            log.warning("the output of a layer cannot be told", exc_info=True)

    with ExitStack() as stack:
        for number, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(keep, number), with_kwargs=True).remove)
        yield outputs


def _whole(output: Any, arguments: Sequence[Any]) -> Tensor:
    """A copy of the sum that the next layer reads. Raises RuntimeError when it is not known."""
    (forward_batch,) = (each for each in arguments if isinstance(each, ForwardBatch))
    if forward_batch.residual_stream is not None:
        whole: Tensor = residual_batch.snapshot(output, forward_batch)
        return whole
    match output:
        case Tensor():
            return output.clone()
        case (Tensor() as added, Tensor() as before) if added.shape == before.shape:
            return added + before
    raise RuntimeError(f"a layer of SGLang gave a {type(output).__name__} whose sum is not known")
