"""Runs a causal LM in SGLang, whose scheduler processes write the rows into shared memory themselves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdmesh.errors import EngineFailure
from kdmesh.handles.slab.memory import Segment, create_segment
from kdmesh.models.fingerprint import architecture_fingerprint
from kdmesh.models.head import head_spec, output_head
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.models.layer_outputs import numbered_layers
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.sglang import sleep
from kdmesh.sglang.arguments import has_deterministic_inference
from kdmesh.sglang.runtime import SglangRuntime, restart_limits
from kdmesh.sglang.staged_weights import LOADER
from kdmesh.sglang.weights import SglangWeights
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import SleepTag, TokenSequence
from kdmesh.weights.target import StagesInWeights
from kdmesh_teacher.engine import EngineDescription, HeadParts, PrefillJob
from kdmesh_teacher.sglang.ask import Ask
from kdmesh_teacher.sglang.config import SglangEngine as SglangEngineConfig
from kdmesh_teacher.sglang.plugin import SOCKET_VARIABLE
from kdmesh_teacher.sglang.reference import check_reference
from kdmesh_teacher.sglang.sharing import Request, waves

_ARGUMENTS = {
    "enable_return_hidden_states": True,
    # With overlap SGLang copies every hidden state of a batch to the host before our hook sees one.
    "disable_overlap_schedule": True,
}


class SglangEngine(StagesInWeights):
    """One `sglang.Engine`; a `ProcessEngine`.

    A request's rows are counted on the way, and must be those asked for. Without SGLang's own
    deterministic inference, `deterministic` computes every sequence alone and from its first token.
    """

    def __init__(self, config: SglangEngineConfig) -> None:
        self._config = config
        self._runtime = _runtime(config)
        self._num_cached_tokens = 0
        self._is_alone = False
        self._weights: SglangWeights
        self._reader: ImageReader | None
        self._has_new_weights = False

    def load(self) -> EngineDescription:
        """Start SGLang's processes; with node_rank above 0, stay until they end."""
        self._runtime.start()
        self._weights = SglangWeights(self._runtime)
        self._reader = load_image_reader(self._config.model, self._runtime.checkpoint.skeleton.config)
        self._is_alone = self._config.deterministic and not has_deterministic_inference(self._config)
        description = self._describe()
        if self._config.self_probe:
            num_layers = check_reference(self, description, self._runtime.checkpoint, self._reader)
            description = replace(description, num_layers=num_layers)
        return description

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """Write every job's rows; those for ordinary memory go through a segment made for them."""
        with contextlib.ExitStack() as stack:
            requests = list[Request]()
            for job in jobs:
                if job.segment is None:
                    requests += self._asks(job, stack.enter_context(self._scratch(job)))
                else:
                    requests += self._asks(job, job.segment, job.offset_bytes)
            for batch in [[request] for request in requests] if self._is_alone else [requests]:
                self._compute(batch)

    def head_parts(self) -> HeadParts:
        """The output head in the dtype of the rows: of the checkpoint, or of the weights that came since."""
        checkpoint, dtype = self._runtime.checkpoint, self._runtime.dtype
        bytes_of: Callable[[Tensor], memoryview]
        if self._has_new_weights:
            head, bytes_of = output_head(checkpoint.skeleton), self._weights.loaded_bytes
        else:
            head, bytes_of = checkpoint.output_head(getattr(torch, dtype)), _bytes_of
        bias = None if head.bias_V is None else bytes_of(head.bias_V)
        return HeadParts(weight=bytes_of(head.weight_VD), bias=bias, dtype=dtype)

    # Weights

    def commit(self, version: int) -> None:
        """Let SGLang load the second copy; nothing is under way between two prefills."""
        self._runtime.run(sleep.until_idle(self._runtime.engine))
        self._runtime.run(self._weights.load(version))
        self._has_new_weights = True

    # Sleep

    @property
    def sleep_refusal(self) -> str:
        """Why it cannot sleep."""
        return sleep.sleep_refusal(self._config)

    def sleep(self, tags: Set[SleepTag]) -> None:
        """Let SGLang release what the tags name; with the cache go the prefixes in it."""
        self._runtime.run(sleep.release(self._runtime.engine, tags))

    def wake(self, tags: Set[SleepTag]) -> None:
        """Let SGLang take it again."""
        self._runtime.run(sleep.resume(self._runtime.engine, tags))

    # Its processes

    def adopt(self, segment: Segment) -> None:
        """Let the schedulers that write map a segment."""
        self._runtime.schedulers.adopt(segment)

    def drop(self, segment: Segment) -> None:
        """Let them forget it."""
        self._runtime.schedulers.drop(segment)

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call `on_death` when a scheduler dies, or at once when one has died."""
        self._runtime.watch(on_death)

    @property
    def restart_limits(self) -> RestartLimits:
        """As configured."""
        return restart_limits(self._config)

    def restart(self) -> None:
        """End SGLang's processes and start others, whose rows are compared as at the first start."""
        self._runtime.close()
        self._weights.close()
        self._runtime = _runtime(self._config)
        self.load()

    def num_cached_tokens(self) -> int:
        """As SGLang counts them."""
        return self._num_cached_tokens

    def close(self) -> None:
        """Kill SGLang's processes, all of which are this process's children."""
        self._runtime.close()

    def _describe(self) -> EngineDescription:
        config, checkpoint, dtype, reader = self._config, self._runtime.checkpoint, self._runtime.dtype, self._reader
        architecture = architecture_fingerprint(checkpoint.skeleton) if config.updatable else ""
        tokenizer = load_tokenizer(config.model)
        vocabulary = None if tokenizer is None else tokenizer.get_vocab()
        rows = output_head(checkpoint.skeleton).vocabulary_size  # all of them are tokens where no tokenizer says so
        tokens = rows if vocabulary is None else max(vocabulary.values()) + 1
        return EngineDescription(
            name=config.model.resolve().name,
            model_fingerprint=architecture
            or checkpoint.fingerprint(
                dtype.value, config.quantization or "", *([] if reader is None else [reader.fingerprint])
            ),
            tokenizer_fingerprint="" if vocabulary is None else tokenizer_fingerprint(vocabulary),
            hidden_size=checkpoint.skeleton.config.get_text_config().hidden_size,
            dtype=dtype,
            head=head_spec(checkpoint.skeleton, tokens),
            max_sequence_tokens=min(self._runtime.max_input_tokens - 1, config.max_batch_tokens),
            max_batch_tokens=config.max_batch_tokens,
            is_deterministic=config.deterministic,
            architecture_fingerprint=architecture,
            vision=reader,
            num_layers=0 if config.layers_refusal else len(numbered_layers(checkpoint.skeleton)),
        )

    @contextlib.contextmanager
    def _scratch(self, job: PrefillJob) -> Iterator[int]:
        segment = create_segment(len(job.out), self)
        try:
            yield segment.number
            job.out[:] = segment.writable[: len(job.out)]
        finally:
            self.drop(segment)
            segment.close()

    def _asks(self, job: PrefillJob, segment: int, offset_bytes: int = 0) -> Iterator[Request]:
        row_bytes = len(job.out) // job.num_rows
        for sequence in job.sequences:
            yield (
                sequence,
                Ask(
                    segment=segment,
                    offset_bytes=offset_bytes,
                    dtype=self._runtime.dtype,
                    first_computed=0 if self._is_alone else int(sequence.positions[0]),
                    positions=sequence.positions,
                    layers=job.layers,
                ),
            )
            offset_bytes += sequence.num_rows * row_bytes

    def _compute(self, requests: Sequence[Request]) -> None:
        answers = self._runtime.run(self._answers(requests))
        for index, (sequence, _) in enumerate(requests):
            answer = answers[index]
            meta = answer["meta_info"]
            (delivered,) = meta.get("hidden_states") or [None]
            if delivered != [sequence.num_rows, sequence.num_tokens]:
                raise EngineFailure(
                    f"SGLang delivered [rows, tokens] {delivered}; asked for were "
                    f"{[sequence.num_rows, sequence.num_tokens]}, and it says: {meta.get('finish_reason')}"
                )
            self._num_cached_tokens += meta["cached_tokens"]

    async def _answers(self, requests: Sequence[Request]) -> dict[int, dict[str, Any]]:
        """What SGLang says to each request."""
        alone, shared = waves(requests) if self._config.prefix_cache else (list(range(len(requests))), [])
        answers: dict[int, dict[str, Any]] = {}

        async def generate(indices: Sequence[int]) -> None:
            if indices:
                chosen = await self._generate([requests[index] for index in indices])
                answers.update(zip(indices, chosen, strict=True))

        async def generate_shared(leader: int, followers: Sequence[int]) -> None:
            await generate([leader])
            await generate(followers)

        await asyncio.gather(generate(alone), *(generate_shared(*wave) for wave in shared))
        return answers

    async def _generate(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Those with images apart from the others, which SGLang does not take in one call."""
        seeing = [index for index, (sequence, _) in enumerate(requests) if sequence.images]
        reading = [index for index, (sequence, _) in enumerate(requests) if not sequence.images]
        groups = [group for group in (seeing, reading) if group]
        answers = await asyncio.gather(*(self._generate_alike([requests[i] for i in group]) for group in groups))
        found = dict(zip(itertools.chain(*groups), itertools.chain(*answers), strict=True))
        return [found[index] for index in range(len(requests))]

    async def _generate_alike(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        images = await asyncio.to_thread(lambda: [self._image_data(sequence) for sequence, _ in requests])
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        answers: list[dict[str, Any]] = await self._runtime.engine.async_generate(
            input_ids=[sequence.token_ids.tolist() for sequence, _ in requests],
            sampling_params=[sampling | {"custom_params": ask.to_params()} for _, ask in requests],
            return_hidden_states=True,
            image_data=images if requests[0][0].images else None,
        )
        return answers

    def _image_data(self, sequence: TokenSequence) -> list[dict[str, Any]]:
        """As SGLang takes what a processor has made: ours, so that it sees what the student sees."""
        if not sequence.images:
            return []
        assert self._reader is not None
        inputs = self._reader.inputs([p.image for p in sequence.images if p.image is not None])
        return [{"format": "processor_output", **inputs}]


def _runtime(config: SglangEngineConfig) -> SglangRuntime:
    loader = {"custom_weight_loader": [LOADER]} if config.updatable else {}
    return SglangRuntime(config, socket_variable=SOCKET_VARIABLE, arguments=_ARGUMENTS | loader)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy().data.toreadonly()
