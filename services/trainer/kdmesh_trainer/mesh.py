"""The ranks of one job, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kdmesh.allocator import keep_freed_memory
from kdmesh.allowance import num_cores
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh.models.context import ContextGroup

T = TypeVar("T")

_FAILED = "kdmesh/failed"
# A collective waits while another rank loads a model or writes a checkpoint; waits for a teacher come on top.
_COLLECTIVE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """This process's place among the ranks of the job."""

    rank: int
    world_size: int
    device: torch.device
    device_mesh: DeviceMesh  # (shard), or (replicate, shard) where there are several copies of the student
    store: Store
    context: ContextGroup | None = None  # those that hold each row of tokens together; None: each rank has its own

    @property
    def data_group(self) -> int:
        """Which of the groups with rows of their own this rank is in: a rank, unless several hold a row together."""
        return self.rank // self._ranks_per_row

    @property
    def num_data_groups(self) -> int:
        """Among how many groups the sequences of a step are divided."""
        return self.world_size // self._ranks_per_row

    def place_of(self, rank: int) -> tuple[int, int]:
        """Its data group, and its place there."""
        return divmod(rank, self._ranks_per_row)

    @property
    def _ranks_per_row(self) -> int:
        return 1 if self.context is None else self.context.size

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all ranks of a tensor on `device`, in place. Collective."""
        dist.all_reduce(values)
        return values

    def is_any(self, value: bool) -> bool:
        """Whether `value` is true on any rank. Collective, on the CPU: it never waits for a GPU."""
        flag = torch.tensor([int(value)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on the first rank, which alone runs it. Collective.

        The result must be a plain value. An error that it raises on purpose is raised on every rank.
        """
        outcome: list[T | KdmeshError | None] = [None]
        if self.is_first:
            try:
                outcome[0] = call()
            except KdmeshError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        result = outcome[0]
        if isinstance(result, KdmeshError):
            raise result
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's plain value, by rank. Collective."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def is_first_to_fail(self) -> bool:
        """True for one rank only, whichever asks first; not collective. So one failure is told once."""
        try:
            return self.store.add(_FAILED, 1) == 1
        except dist.DistError:  # the rank that holds the store is gone, so it has failed before
            return False


@contextmanager
def joined(
    device: Literal["auto", "cpu", "cuda"], *, longest_wait_s: float, shard_ranks: int | None = None, context: int = 1
) -> Iterator[Mesh]:
    """Join the ranks that torchrun's environment describes; alone when there is no such environment.

    Args:
        longest_wait_s: how long one rank may keep the others waiting, beside loading and saving.
        shard_ranks: how many hold one copy of the student between them; divides their number. None: all of them.
        context: ranks, one after the other, that hold each row of tokens together; divides the number of ranks.

    Raises:
        ConfigError: GPUs are asked for and there are none, or fewer than ranks on this machine.

    What is raised within says that this rank fails, perhaps alone: see leave.
    """
    local = _device(device)
    store, rank, world_size = next(rendezvous("env://")) if "RANK" in os.environ else _alone()
    timeout = timedelta(seconds=_COLLECTIVE_S + longest_wait_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo",
        store=PrefixStore("kdmesh/group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    has_failed = True
    try:
        yield Mesh(
            rank=rank,
            world_size=world_size,
            device=local,
            device_mesh=device_mesh(local.type, shard_ranks=shard_ranks or world_size, timeout=timeout),
            store=store,
            context=context_group(context, timeout=timeout),
        )
        has_failed = False
    finally:
        leave(local, has_failed=has_failed)


def leave(device: torch.device, *, has_failed: bool) -> None:
    """Leave the ranks: together, or alone after a failure, where the process is to end next.

    NCCL's groups are destroyed together: a rank that failed alone would wait for the others, and they for it in their
    next collective, until that has taken too long. As it is the process ends, and torchrun ends the others. gloo's
    groups are left at once, which the others notice.
    """
    if has_failed and device.type == "cuda" and dist.get_world_size() > 1:
        return
    dist.destroy_process_group()


def device_mesh(device: str, *, shard_ranks: int, timeout: timedelta) -> DeviceMesh:
    """All ranks, by copy of the student and by part of a copy; by part alone where there is one copy. Collective.

    Those that share a copy follow one another, so that it lies on one machine where as many are.

    Args:
        shard_ranks: how many share a copy; divides the number of ranks.
        timeout: of every collective.
    """
    ranks = dist.get_world_size()
    assert ranks % shard_ranks == 0, f"{shard_ranks} of {ranks}"
    if shard_ranks == ranks:
        return init_device_mesh(device, (ranks,))
    grid = torch.arange(ranks).view(-1, shard_ranks)
    # Made here, because init_device_mesh gives new groups torch's own timeouts: of NCCL ten minutes.
    groups = [_own_group(grid.T.tolist(), timeout), _own_group(grid.tolist(), timeout)]
    return DeviceMesh.from_group(groups, device, mesh=grid, mesh_dim_names=("replicate", "shard"))


def context_group(size: int, *, timeout: timedelta) -> ContextGroup | None:
    """Those that hold each row of tokens together with this rank; None: it holds its own. Collective.

    They follow one another, so that they are on one machine where as many are.

    Args:
        size: how many; divides the number of ranks.
        timeout: of every collective.
    """
    if size == 1:
        return None
    members = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    return ContextGroup(place=dist.get_rank() % size, size=size, group=_own_group(members, timeout))


def _own_group(members: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """This rank's of these groups; every rank makes all of them, in this order."""
    groups: list[dist.ProcessGroup] = [dist.new_group(ranks, timeout=timeout) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)


def _alone() -> tuple[Store, int, int]:
    return dist.HashStore(), 0, 1  # type: ignore[attr-defined]


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    keep_freed_memory()
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("student.device is cuda, but torch sees no GPU on this machine")
    if wanted == "cpu" or not has_gpu:
        _use_cores()
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ConfigError(f"local rank {index} has no GPU of its own: torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _use_cores() -> None:
    """Share this machine's cores among its ranks, unless OMP_NUM_THREADS decides."""
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, num_cores() // ranks))
