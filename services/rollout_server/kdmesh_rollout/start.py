"""From a configuration to the parts that answer requests: the loaded and proven engine, the queue, the weights."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from functools import partial

from kdmesh.models.placement import gpu
from kdmesh.rpc.weights.updates import WeightUpdates
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.revival import Revival
from kdmesh.serving.engine.sleep import Sleep, WorkAndUpdates
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.engine.updating import Updating
from kdmesh.serving.images import ImageStore
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import RolloutDescription
from kdmesh_rollout import probe
from kdmesh_rollout.config import RolloutConfig, TransformersEngine
from kdmesh_rollout.engine import Engine, ProcessEngine
from kdmesh_rollout.metrics import Gauges, Metrics
from kdmesh_rollout.parts import Parts
from kdmesh_rollout.scheduler import LoadedEngine, Scheduler

log = logging.getLogger(__name__)


async def start(
    config: RolloutConfig,
    engine: Engine,
    thread: EngineThread,
    *,
    jobs: JobTable[JobTerms],
    metrics: Metrics,
    gate: Gate[Parts],
    stack: AsyncExitStack,
) -> Parts:
    """Everything that answers requests; `stack` ends it. The scheduler does not run yet.

    Raises:
        ConfigError: the model is not to be had.
        EngineFailure: the engine does not sample as it must.
    """
    began_s = time.monotonic()
    if isinstance(engine, ProcessEngine):
        stack.push_async_callback(asyncio.to_thread, engine.close)
    model = await thread.run(engine.load)
    check = partial(probe.check_samples, engine, model)
    await thread.run(check)
    log.info("model loaded", extra={"model": model.name, "seconds": time.monotonic() - began_s})
    loaded = LoadedEngine(engine=engine, thread=thread, model=model, check=check)
    scheduler = Scheduler(loaded, max_waiting_tokens=config.queue.max_tokens, jobs=jobs, metrics=metrics)
    updates = WeightUpdates(
        engine,
        architecture_fingerprint=model.architecture_fingerprint,
        apply=scheduler.apply,
        device=gpu(config.engine.device) if isinstance(config.engine, TransformersEngine) else None,
    )
    stack.push_async_callback(asyncio.to_thread, updates.close)
    images = None if model.vision is None else ImageStore(model.vision, config.images)
    described = RolloutDescription(
        name=model.name,
        architecture_fingerprint=model.architecture_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        vocabulary_size=model.vocabulary_size,
        weight_version=0,
        max_sequence_tokens=model.max_sequence_tokens,
        is_deterministic=model.is_deterministic,
        dtype=model.dtype,
        vision=None if images is None else images.spec,
    )
    updating = Updating()
    sleep = Sleep(engine, thread, WorkAndUpdates(scheduler, updating), gate)
    run = scheduler.run
    if isinstance(engine, ProcessEngine):

        async def bring_back() -> None:
            await updates.start_over()
            await thread.run(check)
            await sleep.sleep_again()
            updating.accept()

        run = Revival(engine, thread, scheduler, gate, before=updating.hold_off, after=bring_back).run
    parts = Parts(
        model_at_start=described,
        scheduler=scheduler,
        updates=updates,
        updating=updating,
        sleep=sleep,
        images=images,
        run=run,
    )
    metrics.watch(lambda: _gauges(parts, engine))
    return parts


def _gauges(parts: Parts, engine: Engine) -> Gauges:
    queue = parts.scheduler.queue
    states = parts.job_states()
    parts.jobs.forget_silent({state.job for state in states if state.is_present})
    return Gauges(
        jobs=states,
        running_samples=parts.scheduler.num_running,
        waiting_samples=queue.num_requests,
        waiting_tokens=queue.num_tokens,
        engine_tokens_per_s=parts.scheduler.tokens_per_s or 0.0,
        model=parts.model_at_start.name,
        weight_version=parts.updates.version,
        weights_updated_at_s=parts.updates.updated_at_s,
        drawn_tokens=engine.num_drawn_tokens,
        prefilled_tokens=engine.num_prefilled_tokens,
        asleep=parts.sleep.asleep,
    )
