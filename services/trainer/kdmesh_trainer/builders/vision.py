"""Readies a student that reads images for the data that it will see."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from kdmesh.chats.image_files import NoImages
from kdmesh.errors import ConfigError
from kdmesh.models.directory import check_model_directory, read_config
from kdmesh.models.images.families import UNREAD
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader, load_image_reader
from kdmesh.models.images.vision import has_axes, reads_images, unused_vision
from kdmesh.models.verify import check_images
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.files.readers import TEXT_STUDENT
from kdmesh_trainer.student import freezing

log = logging.getLogger(__name__)


def load_reader(cfg: TrainerConfig) -> ImageReader | None:
    """How the student reads the images of the data; None where it reads text alone, or must.

    Raises:
        ConfigError: the files beside the student do not make one, or it is to freeze what it does not have.
    """
    check_model_directory(cfg.student.model, needs_weights=False)
    reader = load_image_reader(cfg.student.model)
    if cfg.student.freeze_vision and reader is None:
        raise ConfigError(f"student.freeze_vision: {cfg.student.model} reads no images")
    # A teacher with another tokenizer has other image tokens: its rows would be of other images, or of none.
    return None if cfg.data.teacher_tokenizer is not None else reader


def no_images(cfg: TrainerConfig) -> NoImages:
    """Why the data may have none, of a student that load_reader finds no reader for."""
    config = read_config(cfg.student.model)
    why = UNREAD.get(config.model_type)
    if why is None:
        return TEXT_STUDENT
    return NoImages(f"a student of model type {config.model_type} reads text alone here: {why}")


def expansion_of(reader: ImageReader | None) -> str:
    """As TeacherTokens has it."""
    return "" if reader is None else reader.expansion


def build_packer(lm: PreTrainedModel, reader: ImageReader | None, num_images: int, *, freeze_vision: bool) -> Packer:
    """What lays sequences end to end for `lm`, whose vision tower is frozen where that is wanted or nothing is seen.

    Where the data have images, every micro-batch of every rank holds one, a blank one if need be: the ranks gather the
    tower's shards together.

    Args:
        reader: the student's; None where it reads text alone.
        num_images: in all that it will see, the same on every rank.

    Raises:
        ConfigError: the model does not keep images in one row apart.
    """
    is_frozen = freeze_vision or not num_images  # without images it has no gradient, and an optimizer no state for it
    if is_frozen and reads_images(lm.config):
        freezing.freeze_vision(lm)
    if reader is None:
        return Packer(lm, None)
    if num_images:
        check_images(lm, reader)
        if not has_axes(lm.config) and not is_frozen:
            for parameter in unused_vision(lm, reader.blank()[1]):
                parameter.requires_grad_(False)  # an optimizer has no state for what never has a gradient
    log.info("student reads images", extra={"images": num_images, "vision_is_frozen": is_frozen})
    return Packer(lm, reader, always_sees=num_images > 0)
