"""The teacher's output head, of the version that a step's rows have."""

from __future__ import annotations

from typing import Protocol

import torch

from kdmesh.errors import ModelMismatch
from kdmesh.losses import OutputHead


class HeadService(Protocol):
    """Where a teacher's head comes from."""

    def head(self) -> tuple[OutputHead, int]:
        """The current head on the CPU, padding rows included, and its weight version. Blocks."""
        ...


class TeacherHead:
    """Holds one version of the head on this rank's device, and fetches another only when rows need it."""

    def __init__(self, service: HeadService, *, vocabulary_size: int, device: torch.device) -> None:
        self._service = service
        self._vocabulary_size = vocabulary_size
        self._device = device
        self._version: int | None = None
        self._head: OutputHead | None = None

    def at(self, weight_version: int) -> OutputHead:
        """The head that turns rows of `weight_version` into logits over the real vocabulary. Borrowed.

        Raises:
            ModelMismatch: the service has another version by now, so these rows cannot be used.
        """
        if self._head is None or self._version != weight_version:
            self._head = None  # let go of the old one before the new one takes as much memory
            head, self._version = self._service.head()
            self._head = _on_device(head.sliced(self._vocabulary_size), self._device)
        if self._version != weight_version:
            raise ModelMismatch(
                f"rows have weight version {weight_version}, but the teacher's head has {self._version}; "
                "rows and head of one step must have the same"
            )
        return self._head


def _on_device(head: OutputHead, device: torch.device) -> OutputHead:
    return OutputHead(
        weight_VD=head.weight_VD.to(device),
        bias_V=None if head.bias_V is None else head.bias_V.to(device),
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )
