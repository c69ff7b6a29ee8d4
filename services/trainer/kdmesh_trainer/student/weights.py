"""The student's tensors as a plain Hugging Face model has them, whatever they are made of while it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from kdmesh_trainer.student.fake_quantization import QuantizedLinear, Rounding
from kdmesh_trainer.student.four_bit import FourBitLinear, numbers_shape, unpack
from kdmesh_trainer.student.lora import Adapter, LowRank
from kdmesh_trainer.student.shards import own_shard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudentWeight:
    """One tensor: a parameter or a saved buffer, with what an adapter adds to it."""

    base: Tensor  # a shard when the student is sharded
    added: LowRank | None
    is_packed: bool = False  # whether `base` is the bytes of a matrix in four bits
    rounding: Rounding | None = None  # of what the student computes with in its place; None: it is `base`

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return numbers_shape(self.base) if self.is_packed else tuple(self.base.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether it has numbers that are rounded to an element type."""
        return self.is_packed or self.base.is_floating_point()

    @property
    def can_change(self) -> bool:
        """Whether training changes it."""
        return self.added is not None or self.base.requires_grad

    def shard(self) -> Tensor:
        """This rank's part of the tensor as it is now, added up as the student keeps it. Collective with an adapter."""
        base = self.base_shard()
        return base if self.added is None else _sum(base, self.added)

    def base_shard(self) -> Tensor:
        """This rank's part of what an adapter is added to, or of what the student computes with."""
        if self.rounding is not None:
            return self.rounding.rounded(self.base.detach())
        return unpack(self.base.detach()) if self.is_packed else self.base.detach()

    def master(self) -> StudentWeight:
        """The same as it is trained, and not as it is computed with."""
        return replace(self, rounding=None)

    def whole(self, dtype: torch.dtype | None) -> Tensor:
        """The tensor as it is now, added up as the student keeps it and then rounded to `dtype` once. Collective.

        Args:
            dtype: None leaves it as it is.
        """
        return whole(self.shard(), dtype)

    def whole_base(self, dtype: torch.dtype) -> Tensor:
        """All of what an adapter is added to, rounded to `dtype`. Collective."""
        return whole(self.base_shard(), dtype)

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Whether rounding to `dtype` changes nothing of the base that this rank holds."""
        base = own_shard(self.base_shard())
        return torch.equal(base.to(dtype).to(base.dtype), base)


def whole(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """All of a tensor that may be a shard, on the ranks' device, in `dtype`; None leaves it as it is. Collective."""
    # Rounded before it is gathered: fewer bytes travel.
    tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    if not isinstance(tensor, DTensor):
        return tensor
    # What the host keeps is gathered on the device, where all others are and NCCL carries it.
    near: DTensor = tensor.to(tensor.device_mesh.device_type)  # type: ignore[assignment]
    return near.full_tensor()


def weights_of(lm: PreTrainedModel, adapter: Adapter | None) -> dict[str, StudentWeight]:
    """Every parameter and saved buffer by its name in a model without adapters; tied ones are the same object.

    Args:
        lm: sharded or not.
        adapter: that was put into it, if any.
    """
    tensors, added = dict(lm.state_dict(keep_vars=True)), dict[str, LowRank]()
    if adapter is not None:
        tensors, added = adapter.split(tensors)
    packed = {id(module.weight) for module in lm.modules() if isinstance(module, FourBitLinear)}
    roundings = {id(module.weight): module.rounding for module in lm.modules() if isinstance(module, QuantizedLinear)}
    once: dict[int, StudentWeight] = {}
    named = {}
    for name, tensor in tensors.items():
        weight = StudentWeight(
            base=tensor, added=added.get(name), is_packed=id(tensor) in packed, rounding=roundings.get(id(tensor))
        )
        weight = once.setdefault(id(tensor), weight)
        named[name if adapter is None else adapter.plain_name(name)] = weight
    return named


def without_aliases(weights: dict[str, StudentWeight]) -> dict[str, StudentWeight]:
    """Tied ones once, under the first of their names."""
    once: dict[int, str] = {}
    for name, weight in weights.items():
        once.setdefault(id(weight), name)
    return {name: weights[name] for name in once.values()}


def _sum(base: Tensor, added: LowRank) -> Tensor:
    a, b = added.a.detach(), added.b.detach()
    if isinstance(a, DTensor):
        # The others are split by rows, so each rank computes the rows that it has.
        a = a.redistribute(placements=[Replicate()] * a.device_mesh.ndim)
    total = torch.addmm(base.to(a.dtype), b, a, alpha=added.scaling)
    if added.magnitude is None:
        return total
    lengths = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    scales: Tensor = added.magnitude.detach().unsqueeze(1) / lengths
    return total * scales
