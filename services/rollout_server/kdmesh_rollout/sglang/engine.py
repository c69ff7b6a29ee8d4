"""Samples from a causal LM in SGLang, whose scheduler processes draw, and load new weights from shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Coroutine, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from kdmesh.errors import EngineFailure
from kdmesh.models.fingerprint import architecture_fingerprint
from kdmesh.models.head import head_spec, output_head
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.serving.engine.revival import RestartLimits
from kdmesh.sglang import sleep
from kdmesh.sglang.arguments import has_deterministic_inference
from kdmesh.sglang.runtime import SglangRuntime, restart_limits
from kdmesh.sglang.staged_weights import LOADER
from kdmesh.sglang.weights import SglangWeights
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import FinishReason, Sample, Sampling, SleepTag
from kdmesh.weights.target import StagesInWeights
from kdmesh_rollout.engine import EngineDescription, Finished, Order
from kdmesh_rollout.sglang.ask import Ask
from kdmesh_rollout.sglang.config import SglangEngine as SglangEngineConfig
from kdmesh_rollout.sglang.plugin import SOCKET_VARIABLE
from kdmesh_rollout.sglang.reference import check_reference

Answer: TypeAlias = dict[str, Any]
"""What SGLang says to a request."""

# Below, a round trip to the scheduler costs more than the tokens.
_MIN_SHARED_TOKENS = 32


@dataclass(slots=True, kw_only=True, eq=False)
class _Drawing:
    """One sample that SGLang draws."""

    order: Order
    most: int  # tokens of the response
    name: str  # by which SGLang knows it
    task: asyncio.Task[None] | None = None  # None: it begins with the next step


class SglangEngine(StagesInWeights):
    """One `sglang.Engine`; a `ProcessEngine`.

    SGLang decodes without pause. A step waits until a sample has finished, or until it is interrupted.
    Without SGLang's own deterministic inference, `deterministic` computes every sample alone.
    """

    def __init__(self, config: SglangEngineConfig) -> None:
        self._config = config
        self._is_alone = config.deterministic and not has_deterministic_inference(config)
        self._runtime = self._new_runtime()
        self._description: EngineDescription
        self._weights: SglangWeights
        self._reader: ImageReader | None
        self._changed: asyncio.Event
        self._drawings: dict[int, _Drawing] = {}
        self._prompts: set[asyncio.Task[None]] = set()  # being computed before the samples that share them
        self._leaving: list[asyncio.Event] = []  # set when SGLang has let go of a sample that was aborted
        self._requests = itertools.count()
        self._finished: list[Finished] = []
        self._failure: Exception | None = None
        self._drawn_tokens = self._prefilled_tokens = 0

    # Loading

    def load(self) -> EngineDescription:
        """Start SGLang's processes."""
        self._runtime.start()
        self._changed = asyncio.Event()
        self._reader = load_image_reader(self._config.model, self._runtime.checkpoint.skeleton.config)
        self._description = self._describe()
        if self._config.self_probe:
            check_reference(self, self._description, self._runtime, self._reader)
        return self._description

    def _describe(self) -> EngineDescription:
        config, skeleton = self._config, self._runtime.checkpoint.skeleton
        tokenizer = load_tokenizer(config.model)
        vocabulary = None if tokenizer is None else tokenizer.get_vocab()
        rows = output_head(skeleton).vocabulary_size  # all of them are tokens where no tokenizer says so
        tokens = rows if vocabulary is None else max(vocabulary.values()) + 1
        self._weights = SglangWeights(self._runtime)
        return EngineDescription(
            name=config.model.resolve().name,
            architecture_fingerprint=architecture_fingerprint(skeleton),
            tokenizer_fingerprint="" if vocabulary is None else tokenizer_fingerprint(vocabulary),
            vocabulary_size=head_spec(skeleton, tokens).vocabulary_size,
            dtype=self._runtime.dtype,
            max_sequence_tokens=self._runtime.max_input_tokens,
            max_running=config.max_running,
            is_deterministic=config.deterministic,
            vision=self._reader,
        )

    # Sampling

    def add(self, order: Order) -> None:
        """Begin a sample with the next step."""
        most = min(order.sampling.max_new_tokens, self._description.max_sequence_tokens - len(order.prompt_ids))
        self._drawings[order.key] = _Drawing(order=order, most=most, name=self._new_name())

    def abort(self, key: int) -> None:
        """Forget a sample; SGLang is told at once."""
        drawing = self._drawings.pop(key, None)
        self._finished = [finished for finished in self._finished if finished.key != key]
        if drawing is not None and drawing.task is not None:
            drawing.task.cancel()
            with contextlib.suppress(EngineFailure):  # a dead one has forgotten it
                self._runtime.run(self._leave(drawing.task, drawing.name))
        if not self._drawings:
            self._failure = None

    def step(self) -> list[Finished]:
        """Wait until something has finished, or until `interrupt` is called."""
        return self._runtime.run(self._step()) if self.num_running else []

    def interrupt(self) -> None:
        """Let a step return now."""
        self._runtime.loop.call_soon_threadsafe(self._changed.set)

    @property
    def num_running(self) -> int:
        """Samples under way."""
        return len(self._drawings) + len(self._finished)

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens drawn since the start, counted when their sample ends."""
        return self._drawn_tokens

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed since the start, counted when their sample ends."""
        return self._prefilled_tokens

    async def _step(self) -> list[Finished]:
        self._join()
        await self._changed.wait()
        self._changed.clear()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        finished, self._finished = self._finished, []
        return finished

    def _join(self) -> None:
        """Begin what was added. Of a prompt that several have, SGLang computes one before it is given the others."""
        by_prompt: dict[bytes, list[_Drawing]] = {}
        for drawing in self._drawings.values():
            if drawing.task is None:
                by_prompt.setdefault(_name(drawing.order), []).append(drawing)
        for drawings in by_prompt.values():
            prompt = None
            first = drawings[0].order
            if len(drawings) > 1 and len(first.prompt_ids) >= _MIN_SHARED_TOKENS and self._keeps_prompts:
                prompt = asyncio.create_task(self._try(self._prefill(first)))
                self._prompts.add(prompt)
                prompt.add_done_callback(self._prompts.discard)
            for drawing in drawings:
                drawing.task = asyncio.create_task(self._try(self._draw(drawing, prompt)))

    @property
    def _keeps_prompts(self) -> bool:
        return self._config.prefix_cache and not self._is_alone

    async def _try(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            await call
        except Exception as error:  # noqa: BLE001 - whoever makes the next step gets it
            self._failure = error
            self._changed.set()

    async def _prefill(self, order: Order) -> None:
        self._count(await self._generate(order, self._new_name(), max_new_tokens=0))

    async def _draw(self, drawing: _Drawing, prompt: asyncio.Task[None] | None) -> None:
        if prompt is not None:
            await asyncio.wait((prompt,))  # leaves it alone when this is cancelled
        order = drawing.order
        answer = await self._generate(order, drawing.name, max_new_tokens=drawing.most)
        self._count(answer)
        self._finished.append(Finished(key=order.key, sample=_sample(answer, order.sampling, drawing.most)))
        del self._drawings[order.key]
        self._changed.set()

    async def _generate(self, order: Order, name: str, *, max_new_tokens: int) -> Answer:
        ask = Ask(
            sampling=order.sampling,
            seed=secrets.randbits(63) if order.seed is None else order.seed,
            vocabulary_size=self._description.vocabulary_size,
            # An image token without an image is nothing that a sequence may hold.
            never=None if self._reader is None else self._reader.token_id,
        )
        images = await asyncio.to_thread(self._image_data, order) if order.images else None
        answer: Answer = await self._runtime.engine.async_generate(
            input_ids=order.prompt_ids.tolist(),
            sampling_params={
                "max_new_tokens": max_new_tokens,
                "stop_token_ids": list(order.sampling.stop_token_ids),
                "custom_params": ask.to_params(),
            },
            return_logprob=max_new_tokens > 0,
            rid=name,
            image_data=images,
        )
        return answer

    def _image_data(self, order: Order) -> list[dict[str, Any]]:
        """As SGLang takes what a processor has made: ours, so that it sees what the student sees."""
        assert self._reader is not None
        inputs = self._reader.inputs([p.image for p in order.images if p.image is not None])
        return [{"format": "processor_output", **inputs}]

    def _new_name(self) -> str:
        return f"kdmesh-{next(self._requests)}."  # SGLang aborts whatever begins with a name, hence the dot

    async def _leave(self, task: asyncio.Task[None], name: str) -> None:
        """SGLang's side of a cancelled request tells SGLang to abort it."""
        await asyncio.wait((task,))
        state = self._runtime.engine.tokenizer_manager.rid_to_state.get(name)
        if state is not None:
            self._leaving.append(state.event)

    async def _settle(self) -> None:
        """Return when SGLang has let go of what was aborted, which takes it a decoding step, and of prompts."""
        leaving, self._leaving = self._leaving, []
        await asyncio.gather(*(event.wait() for event in leaving), *self._prompts)

    def _count(self, answer: Answer) -> None:
        meta = answer["meta_info"]
        self._drawn_tokens += meta["completion_tokens"]
        self._prefilled_tokens += meta["prompt_tokens"] - meta["cached_tokens"]

    # Weights

    def commit(self, version: int) -> None:
        """Let SGLang load the second copy; what is under way is computed anew from its tokens."""
        self._runtime.run(self._commit(version))

    async def _commit(self, version: int) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

        manager = self._runtime.engine.tokenizer_manager
        await self._settle()  # else what is aborted would be computed once more
        # Gives up the keys and values of what is under way, which then waits.
        await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        await self._weights.load(version)
        await manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    # Sleep

    @property
    def sleep_refusal(self) -> str:
        """Why it cannot sleep."""
        return sleep.sleep_refusal(self._config)

    def sleep(self, tags: Set[SleepTag]) -> None:
        """Let SGLang release what the tags name."""
        self._runtime.run(self._settle())
        self._runtime.run(sleep.release(self._runtime.engine, tags))

    def wake(self, tags: Set[SleepTag]) -> None:
        """Let SGLang take it again."""
        self._runtime.run(sleep.resume(self._runtime.engine, tags))

    # Its processes

    def _new_runtime(self) -> SglangRuntime:
        arguments = _arguments(self._config, is_alone=self._is_alone)
        return SglangRuntime(self._config, socket_variable=SOCKET_VARIABLE, arguments=arguments)

    @property
    def restart_limits(self) -> RestartLimits:
        """As configured."""
        return restart_limits(self._config)

    def restart(self) -> None:
        """End SGLang's processes and start others, with the weights of the checkpoint."""
        self._runtime.close()
        self._drawings.clear()
        self._prompts.clear()
        self._leaving, self._finished, self._failure = [], [], None
        self._weights.close()
        self._runtime = self._new_runtime()
        self.load()

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call `on_death` when a scheduler dies, or at once when one has died."""
        self._runtime.watch(on_death)

    def close(self) -> None:
        """Kill SGLang's processes, all of which are this process's children."""
        self._runtime.close()


def _arguments(config: SglangEngineConfig, *, is_alone: bool) -> dict[str, Any]:
    return {
        # Our hook must know every token before it draws the next.
        "disable_overlap_schedule": True,
        # Else logits of a 16-bit model are rounded to 16 bits, which the trainer's forward does not do.
        "enable_fp32_lm_head": config.arguments.get("enable_fp32_lm_head", True),
        "max_running_requests": 1 if is_alone else config.max_running,
        "disable_radix_cache": is_alone or not config.prefix_cache,
        "custom_weight_loader": [LOADER],
        "weight_version": "0",
    }


def _name(order: Order) -> bytes:
    """Of its prompt: equal where tokens and images are."""
    images = b"".join(image.digest for image in order.images)
    return len(order.images).to_bytes(8, "little") + images + order.prompt_ids.tobytes()


def _sample(answer: Answer, sampling: Sampling, most: int) -> Sample:
    """Raises EngineFailure when SGLang ended it otherwise than it was told."""
    meta = answer["meta_info"]
    token_ids = np.array(answer["output_ids"], np.int32)
    ended = meta["finish_reason"]
    if ended["type"] == "length":
        reason, is_right = FinishReason.LENGTH, len(token_ids) == most
    else:
        reason, is_right = FinishReason.STOP, ended["type"] == "stop" and len(token_ids) > 0
        is_right = is_right and (bool(sampling.stop_strings) or int(token_ids[-1]) in sampling.stop_token_ids)
    if not is_right:
        raise EngineFailure(f"SGLang ended a sample of at most {most} tokens after {len(token_ids)}, and says: {ended}")
    versions = [int(span["version"]) for span in meta["weight_versions"]]
    return Sample(
        token_ids=token_ids,
        logprobs=np.array([logprob for logprob, *_ in meta["output_token_logprobs"]], np.float32),
        finish_reason=reason,
        min_weight_version=versions[0],
        max_weight_version=versions[-1],
    )
