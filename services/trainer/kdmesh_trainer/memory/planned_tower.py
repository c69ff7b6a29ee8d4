"""Stands in for a vision tower that learns, where there is no memory to read images into."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdmesh.losses import FusedLoss, OutputHead
from kdmesh.models.vision import vision_parts
from kdmesh_trainer.student.model import RowLoss, decoder_layers


def images_to_learn_from(lm: PreTrainedModel) -> Callable[[RowLoss], RowLoss]:
    """What gives the loss of a row of text the gradients that images would give the tower of `lm`. Before `shard`.

    The tower's layers are run, so that ranks gather and reduce what they do for images, but compute nothing: images and
    what is kept of them for the backward pass take no memory. In place, and for good.
    """
    inside, _ = vision_parts(lm)
    layers = [layer for layer in decoder_layers(lm) if layer in inside]
    beside = inside - {module for layer in layers for module in layer.modules()}
    for layer in layers:
        layer.forward = partial(_touched, layer.parameters)

    def seen(row_loss: RowLoss) -> RowLoss:
        def loss_of(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
            loss = row_loss(hidden_RD, head, labels_R)
            touched = _touched(partial(_own_parameters, beside), loss.loss_sum)
            for layer in layers:
                touched = layer(touched)
            return replace(loss, loss_sum=touched)

        return loss_of

    return seen


def _own_parameters(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    return (parameter for module in modules for parameter in module.parameters(recurse=False))


def _touched(parameters: Callable[[], Iterable[Tensor]], value: Tensor) -> Tensor:
    """A value that depends on all of them."""
    return torch.stack([value, *(parameter.sum().to(value.dtype) for parameter in parameters())]).sum()
