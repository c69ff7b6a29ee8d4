"""From a configuration to the parts that answer requests: the memory, the loaded and proven engine, the queue."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdmesh.errors import ConfigError
from kdmesh.handles.rdma.memory import RdmaMemory
from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.memory import SegmentWriter
from kdmesh.handles.slab.store import SlabStore
from kdmesh.serving.engine.gate import Gate
from kdmesh.serving.engine.revival import Revival
from kdmesh.serving.engine.sleep import Sleep, WorkAndUpdates
from kdmesh.serving.engine.thread import EngineThread
from kdmesh.serving.engine.updating import Updating
from kdmesh.serving.images import ImageStore
from kdmesh.serving.jobs.table import JobTable
from kdmesh.types import ModelDescription
from kdmesh.weights.manifest import UpdatePolicy
from kdmesh_teacher import probe
from kdmesh_teacher.answering import Answering
from kdmesh_teacher.cache.build import open_cache, open_directory
from kdmesh_teacher.config import EngineConfig, SlabConfig, TeacherConfig, TeacherJobTerms, TransformersEngine
from kdmesh_teacher.engine import Engine, EngineDescription, LoadedEngine, ProcessEngine, UpdatableEngine
from kdmesh_teacher.followed import FollowedJob
from kdmesh_teacher.metrics import Metrics
from kdmesh_teacher.parts import Parts
from kdmesh_teacher.scheduler import QueueLimits, Scheduler
from kdmesh_teacher.served import FIRST_VERSION, first_weights

if TYPE_CHECKING:
    from kdmesh.rpc.teachers.row_carrier import RowCarrier
    from kdmesh.rpc.weights.updates import WeightUpdates

log = logging.getLogger(__name__)

_MAX_REQUEST_TOKENS = 1_000_000  # of one message: ids and positions must fit in channel.MAX_MESSAGE_BYTES


async def start(
    config: TeacherConfig,
    engine: Engine,
    thread: EngineThread,
    *,
    jobs: JobTable[TeacherJobTerms],
    socket_path: Path,
    metrics: Metrics,
    gate: Gate[Parts],
    stack: AsyncExitStack,
) -> Parts:
    """Everything that answers requests; `stack` ends it. The scheduler does not run yet.

    Raises:
        ConfigError: the model or the memory is not to be had, or RDMA is not to be had in a safe way.
        EngineFailure: the engine does not compute what it must.
    """
    began_s = time.monotonic()
    rdma = await asyncio.to_thread(RdmaMemory) if config.server.rdma else None  # first: it may be refused
    directory = await asyncio.to_thread(open_directory, config.cache, stack)
    if isinstance(engine, ProcessEngine):
        stack.push_async_callback(asyncio.to_thread, engine.close)
        described = await thread.run(engine.load)
        store = await stack.enter_async_context(_store(config.slab, socket_path, writer=engine))
    else:
        # The memory first: it is known in a moment whether there is enough.
        store = await stack.enter_async_context(_store(config.slab, socket_path))
        described = await thread.run(engine.load)
    if rdma is not None:
        stack.push_async_callback(asyncio.to_thread, rdma.close)
        await asyncio.to_thread(rdma.serve, store.nonce, store.slots)
    images = None if described.vision is None else ImageStore(described.vision, config.images)
    model = _limited(described, store.limits, images)
    check = partial(probe.check, engine, described)
    await thread.run(check)
    parts = await thread.run(engine.head_parts)
    probe.check_head(parts, described)
    weights = await first_weights(store, parts, described)
    log.info("model loaded", extra={"model": model.name, "seconds": time.monotonic() - began_s})
    cache = open_cache(config.cache, config.engine, described, directory, stack)
    answering = Answering(store, described, metrics, cache)
    stack.push_async_callback(answering.close)
    loaded = LoadedEngine(engine=engine, thread=thread, model=described, check=check)
    limits = QueueLimits(max_tokens=config.queue.max_tokens, max_wait_s=config.queue.max_wait_s)
    scheduler = Scheduler(loaded, store, limits, jobs, metrics, weights, answering)
    updating = Updating()
    sleep = Sleep(engine, thread, WorkAndUpdates(scheduler, updating), gate)
    run = scheduler.run
    if isinstance(engine, ProcessEngine):

        async def bring_back() -> None:
            # The new processes can write no memory that was sealed before they were there.
            await store.replace_memory()
            await thread.run(check)
            await sleep.sleep_again()
            updating.accept()

        run = Revival(engine, thread, scheduler, gate, before=updating.hold_off, after=bring_back).run
    return Parts(
        model_at_start=model,
        store=store,
        rdma=rdma,
        scheduler=scheduler,
        updates=_updates(config.engine, engine, described, scheduler, store, stack),
        carrier=_carrier(config, store),
        updating=updating,
        sleep=sleep,
        run=run,
        cached_tokens=engine.num_cached_tokens if isinstance(engine, ProcessEngine) else lambda: 0,
        cache=cache,
        images=images,
    )


def _updates(
    cfg: EngineConfig,
    engine: Engine,
    model: EngineDescription,
    scheduler: Scheduler,
    store: SlabStore,
    stack: AsyncExitStack,
) -> WeightUpdates | None:
    """What takes new weights, if any may come. Only then is torch loaded for it: frozen teachers start without."""
    if not model.architecture_fingerprint:
        return None
    from kdmesh.models.placement import gpu
    from kdmesh.rpc.weights.updates import WeightUpdates

    assert isinstance(engine, UpdatableEngine)
    followed = FollowedJob(lambda: {session.job for session in store.snapshot().sessions})
    updates = WeightUpdates(
        engine,
        architecture_fingerprint=model.architecture_fingerprint,
        apply=scheduler.apply,
        version=FIRST_VERSION,
        policies=(UpdatePolicy.FINISH,),
        device=gpu(cfg.device) if isinstance(cfg, TransformersEngine) else None,
        admit=followed.admit,
        taken=followed.taken,
    )
    stack.push_async_callback(asyncio.to_thread, updates.close)
    return updates


def _carrier(config: TeacherConfig, store: SlabStore) -> RowCarrier | None:
    """What sends rows through groups, where that is wanted. Only then is torch loaded for it."""
    if not config.server.groups:
        return None
    from kdmesh.models.placement import gpu
    from kdmesh.rpc.teachers.row_carrier import RowCarrier

    return RowCarrier(store, gpu(config.engine.device) if isinstance(config.engine, TransformersEngine) else None)


def _store(slab: SlabConfig, socket_path: Path, writer: SegmentWriter | None = None) -> SlabStore:
    limits = SlabLimits(
        slots=slab.slots,
        slot_bytes=int(slab.slot_mib * 2**20),
        slots_per_session=slab.slots_per_session,
        lease_s=slab.lease_s,
        claim_s=slab.claim_s,
        max_abandoned=slab.max_abandoned,
    )
    return SlabStore(limits, socket_path=socket_path, writer=writer)


def _limited(model: EngineDescription, slab: SlabLimits, images: ImageStore | None) -> ModelDescription:
    """What a client is told: the engine's limits, and what fits in a slot."""
    row_bytes = model.row_bytes(())
    max_rows = slab.slot_bytes // row_bytes
    if max_rows == 0:
        raise ConfigError(f"slab.slot_mib: a slot has {slab.slot_bytes} bytes, and one row of the model {row_bytes}")
    return ModelDescription(
        name=model.name,
        model_fingerprint=model.model_fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        hidden_size=model.hidden_size,
        dtype=model.dtype,
        head=model.head,
        weight_version=FIRST_VERSION,
        max_sequence_tokens=model.max_sequence_tokens,
        max_request_tokens=min(model.max_batch_tokens, _MAX_REQUEST_TOKENS),
        max_request_rows=max_rows,
        is_deterministic=model.is_deterministic,
        architecture_fingerprint=model.architecture_fingerprint,
        vision=None if images is None else images.spec,
        num_layers=model.num_layers,
    )
