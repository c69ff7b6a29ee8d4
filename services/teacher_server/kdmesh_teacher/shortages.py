"""What a request lacks that does not start: said to its job, and counted."""

from __future__ import annotations

from kdmesh.handles.slab.reports import SlotState
from kdmesh.handles.slab.store import SlabStore
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.table import JobTable, Shortage
from kdmesh_teacher.config import TeacherJobTerms
from kdmesh_teacher.work import Work

SLOT_HINT_S = 1.0  # when slots come back depends on the clients, and cannot be measured

Jobs = JobTable[TeacherJobTerms]


def is_over_bytes(store: SlabStore, jobs: Jobs, job: str) -> bool:
    """Whether one slot more would be beyond the bytes that the job may hold; it may always hold one."""
    limit = jobs.terms(job).max_bytes_in_flight
    if limit is None:
        return False
    slots = store.slots_by_job().get(job, 0)
    return slots > 0 and (slots + 1) * store.slot_bytes > limit


def why_waiting(store: SlabStore, jobs: Jobs, queue: FairQueue[Work], work: Work) -> tuple[Shortage, str]:
    """Why a request that waits has not started, as a name and as a sentence."""
    terms, job = jobs.terms(work.job), work.job
    match shortage := jobs.shortage(job, work.num_tokens):
        case Shortage.REQUESTS_PER_S:
            return shortage, f"job {job!r} may start {terms.max_requests_per_s:g} requests a second"
        case Shortage.TOKENS_IN_FLIGHT:
            in_flight = jobs.book(job).tokens_in_flight
            return shortage, f"job {job!r} has {in_flight} tokens in flight, and may have {terms.max_tokens_in_flight}"
    if is_over_bytes(store, jobs, job):
        return Shortage.BYTES_IN_FLIGHT, (
            f"job {job!r} holds {store.slots_by_job()[job]} slots of {store.slot_bytes} bytes, and may hold "
            f"{terms.max_bytes_in_flight} bytes; release some"
        )
    if not store.may_acquire(work.session):
        return Shortage.SLOTS, _slab_state(store, job)
    return Shortage.ENGINE, f"{queue.num_tokens} tokens waited for the engine, {queue.tokens_of(job)} of job {job!r}"


def _slab_state(store: SlabStore, job: str) -> str:
    slots = store.slots_by_state()  # not a snapshot: thousands of requests may have waited for long enough at once
    if slots[SlotState.FREE] and store.slots_by_job().get(job, 0) < store.limits.slots_per_session:
        return "what is free was mapped by other jobs, and gets no new memory"
    if slots[SlotState.FREE]:
        return f"the session has its share of {store.limits.slots_per_session} slots; release some"
    states = ", ".join(f"{count} {state}" for state, count in slots.items() if count)
    return f"no slot came free; of {store.limits.slots} slots are {states}"
