"""What of a vision tower learns, and what stands in for images, where there is no memory to read them into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PreTrainedModel

from kdmesh.losses import FusedLoss, OutputHead
from kdmesh.models.images.reader import load_image_reader
from kdmesh.models.images.vision import has_axes, unused_vision, vision_parts
from kdmesh_trainer.student.model import RowLoss, decoder_layers

SmallImage: TypeAlias = Mapping[str, Tensor | list[Any]]
"""What a tower is given of one, by name."""


def small_image(student: Path) -> SmallImage:
    """The smallest that the model in this directory reads. To be asked for while tensors have values.

    Raises:
        ConfigError: as `load_image_reader`.
    """
    reader = load_image_reader(student)
    assert reader is not None  # of a student whose tower learns
    inputs = reader.blank()[1]
    return {name: value if value.is_floating_point() else value.tolist() for name, value in inputs.items()}


def freeze_unseen(lm: PreTrainedModel, image: SmallImage) -> None:
    """Freeze what of the tower no image reaches, as a job does; under FakeTensorMode.

    Of a tower that looks at values everything learns: of those that are known, images reach all.
    """
    if has_axes(lm.config):
        return
    try:
        unseen = unused_vision(lm, image)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return
    for parameter in unseen:
        parameter.requires_grad_(False)


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
