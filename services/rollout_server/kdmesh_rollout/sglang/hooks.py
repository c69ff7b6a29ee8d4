"""What a rollout server changes in SGLang's scheduler processes: it draws the tokens, and brings new weights.

Four functions of SGLang get a hook, by its own hook registry:

  Scheduler.__init__            afterwards the process reports to the server, and what the model's files say of the end
                                of a text ends no sample any more: its request does.
  Scheduler.run_batch           says which requests the rows of a batch belong to.
  Sampler.forward               ours draws as the embedded engine does. SGLang's own penalises no token of the prompt,
                                heeds the seed of a request only when it is deterministic, and reports log-probabilities
                                after the penalty, over rows of the head too that are no tokens.
  Req._check_str_based_finish   ours finds stop strings. SGLang's own needs its tokenizer, which it is started without.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.sglang.report import report
from kdmesh.sglang.staged_weights import SEGMENTS
from kdmesh_rollout.sglang.ask import Ask
from kdmesh_rollout.sglang.drawing import DrawnSample, draw_rows

_STARTED = "sglang.srt.managers.scheduler.Scheduler.__init__"
_RUN = "sglang.srt.managers.scheduler.Scheduler.run_batch"
_DRAW = "sglang.srt.layers.sampler.Sampler.forward"
_STOP = "sglang.srt.managers.schedule_batch.Req._check_str_based_finish"


def install(socket_path: str) -> None:
    """Register the hooks, which SGLang applies after this."""
    originals = {target: pkgutil.resolve_name(target) for target in (_STARTED, _RUN, _DRAW, _STOP)}
    samples = _Samples()
    HookRegistry.register(_RUN, samples.run, HookType.AROUND)
    HookRegistry.register(_DRAW, samples.draw, HookType.AROUND)
    HookRegistry.register(_STOP, samples.stop, HookType.AROUND)
    HookRegistry.register(_STARTED, partial(_started, socket_path, originals, samples), HookType.AFTER)


class _Samples:
    """Those under way, by SGLang's request."""

    def __init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._batch: Sequence[Any] = ()  # the requests whose rows are being computed
        self._samples: WeakKeyDictionary[Any, DrawnSample] = WeakKeyDictionary()

    def run(self, original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """SGLang calls the sampler within."""
        self._batch = batch.reqs
        try:
            return original(scheduler, batch, *args, **kwargs)
        finally:
            self._batch = ()

    def draw(
        self,
        original: Callable[..., Tensor],
        sampler: Any,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[B] a token for each row."""
        ours = [sample for request in self._batch if (sample := self._of(request)) is not None]
        if not ours:
            return original(sampler, logits_output, sampling_info, return_logprob, *args, **kwargs)
        logits_BV = logits_output.next_token_logits
        assert len(ours) == len(self._batch) == len(logits_BV), "a batch of which we do not know every request"
        draws = [
            # In the other list SGLang has put numbers of the images in their tokens' place, which are no ids.
            sample.draw(request.origin_input_ids_unpadded, request.output_ids, logits_BV.device)
            for sample, request in zip(ours, self._batch, strict=True)
        ]
        tokens_B, logprobs_B = draw_rows(logits_BV, draws, vocabulary_size=ours[0].vocabulary_size, never=ours[0].never)
        if return_logprob:
            logits_output.next_token_logprobs = logprobs_B
        return tokens_B

    def stop(self, original: Callable[..., bool], request: Any, new_accepted_len: int = 1) -> bool:
        """Whether the newest token has ended a sample with a stop string."""
        sample = self._of(request)
        if sample is None:
            return original(request, new_accepted_len)
        if not sample.is_stopped(request.output_ids):
            return False
        from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR

        request.finished_reason = FINISH_MATCHED_STR(matched="")
        request.finished_len = len(request.output_ids)
        return True

    def _of(self, request: Any) -> DrawnSample | None:
        if request not in self._samples:
            ask = Ask.from_params(request.sampling_params.custom_params)
            if ask is None:
                return None
            self._samples[request] = DrawnSample(ask, self._decode)
        return self._samples[request]

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _started(
    socket_path: str, originals: dict[str, object], samples: _Samples, result: None, scheduler: Any, *_: Any, **__: Any
) -> None:
    samples.tokenizer = load_tokenizer(Path(scheduler.model_config.model_path))
    scheduler.model_config.hf_eos_token_id = set()
    SEGMENTS.follow(report(socket_path, originals, writes=False))
