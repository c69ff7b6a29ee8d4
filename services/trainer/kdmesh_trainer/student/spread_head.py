"""A student's output head of which every rank has the rows of its own tokens, and nobody ever has all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses import OutputHead, VocabularyShare
from kdmesh_trainer.student.spread_embedding import plain_embedding, spread_embedding


def check_head(lm: PreTrainedModel) -> tuple[nn.Linear, nn.Embedding | None]:
    """The output head, and the input embedding where that has the same weight.

    Raises:
        ConfigError: one of them has a form that cannot be spread.
    """
    linear, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if not isinstance(linear, nn.Linear) or list(linear.children()):
        raise ConfigError(
            f"parallel.head vocabulary: the output head of {lm.config.model_type} is a {type(linear).__name__}; it "
            "must be a plain linear layer"
        )
    return linear, plain_embedding(embedding) if embedding.weight is linear.weight else None


def spread_head(
    lm: PreTrainedModel, share: VocabularyShare, mesh: DeviceMesh, *, compute_dtype: torch.dtype
) -> set[nn.Parameter]:
    """Make each of the head's tensors a shard by tokens, which FSDP is to leave alone; those are returned.

    Where the input embedding is the same tensor, a token's row is had from the rank that has it, as `compute_dtype`.

    Raises:
        ConfigError: as `check_head`.
    """
    linear, tied = check_head(lm)
    spread = {parameter: _own_part(parameter, share, mesh) for parameter in linear.parameters()}
    for module in lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in spread:
                setattr(module, name, spread[parameter])
    if tied is not None:
        spread_embedding(tied, share, compute_dtype)
    return set(spread.values())


def own_head(head: OutputHead, share: VocabularyShare) -> OutputHead:
    """This rank's real tokens of a head that was spread, without a copy; gradients flow through."""
    bias_V = None if head.bias_V is None else _local(head.bias_V, share)
    return replace(head, weight_VD=_local(head.weight_VD, share), bias_V=bias_V)


def _local(tensor: Tensor, share: VocabularyShare) -> Tensor:
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local if len(local) == share.num_tokens else local[: share.num_tokens]


def _own_part(parameter: nn.Parameter, share: VocabularyShare, mesh: DeviceMesh) -> nn.Parameter:
    """The rows that FSDP would give this rank too, so that checkpoints and exports are the same."""
    part = parameter.detach()[share.first : share.first + share.num_padded]
    own = torch.empty_like(part, device=mesh.device_type).copy_(part)  # the whole goes when nobody refers to it
    shard = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)
