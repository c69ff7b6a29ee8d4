"""What the memory of a rank follows from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdmesh.models.context import Exchange
from kdmesh_trainer.sections.layers_config import LayersConfig
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sections.parallel_config import Gather
from kdmesh_trainer.sections.quantization_config import QuantizationConfig

if TYPE_CHECKING:
    from kdmesh_trainer.sections.teacher_config import FollowConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """The head of a teacher, of which every rank has a copy, or its tokens' rows."""

    hidden_size: int
    dtype: torch.dtype
    has_bias: bool = False
    num_tokens: int | None = None  # whose rows a rank has; None: the student's, or its share of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training job, as far as memory goes."""

    student: Path
    vocabulary_size: int
    teachers: Sequence[TeacherHead]
    compute_dtype: torch.dtype
    device: torch.device
    optimizer: OptimizerConfig
    ranks: int
    lengths: Sequence[int]  # of the sequences of the largest micro-batch, every position with a loss
    accumulates: bool  # whether a rank has several micro-batches in a step
    shard_ranks: int | None = None  # that share a copy of the student; None: all
    gather: Gather = "auto"  # how often the ranks gather the student
    offloads: bool = False  # whether the host keeps parameters, gradients and moments, which says nothing of a CPU
    spreads_head: bool = False  # whether a rank has its own tokens' rows of the heads and no others
    context: int = 1  # ranks that hold the largest micro-batch together
    exchange: Exchange = "heads"  # what those exchange in attention
    lora: LoraConfig | None = None
    quantization: QuantizationConfig | None = None  # of matrices that are rounded in every pass; None: of none
    freeze: Sequence[str] = ()  # names of parameters without a gradient
    trains_vision: bool = False  # whether a vision tower learns, from images that are not counted
    frozen_dtype: torch.dtype = torch.float32  # that weights rest in which `lora` or `freeze` leave without a gradient
    checkpointed_every: int | None = None  # of which decoder layers only the inputs are kept; None: of none
    layers: LayersConfig | None = None  # that are compared with those of the only teacher; None: none
    follows: FollowConfig | None = None  # how the teacher follows the student, of which ranks keep a copy then

    @property
    def place(self) -> int:
        """Of the slice that is planned for: the first has most rows, the last sees most keys."""
        return self.context - 1 if self.exchange == "keys" else 0

    @property
    def uses_host(self) -> bool:
        """Whether the host's memory is another than the device's, and keeps something."""
        return self.offloads and self.device.type != "cpu"
