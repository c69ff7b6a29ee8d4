"""A student's parameters in the type that it computes in, where one rank has all of them."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn


class ComputeCopy:
    """Takes the parameters' places from the forward pass on, and gives them back after the backward pass.

    What FSDP does with mixed precision, without its shards: one rank has nothing to gather, and finding that out costs
    the host a third of what launching the layers does, and more where they are small.

    Attributes:
        copies: what it computes with.
        stays: whether the copies keep their places after a backward pass, because nothing is updated before the next.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, in_float32: Collection[nn.Parameter]) -> None:
        """
        Args:
            module: its parameters have their own type, and stay what is trained; gradients are added to theirs.
            dtype: of the copies; what has this type already, or holds no numbers but bytes, is its own.
            in_float32: those of them for which float32 is the type to compute in.
        """
        self.stays = False
        wide = {id(parameter) for parameter in in_float32}
        copied = [
            (parameter, to)
            for parameter in module.parameters()
            if parameter.is_floating_point()
            and parameter.dtype != (to := torch.float32 if id(parameter) in wide else dtype)
        ]
        self._originals: list[Tensor] = [parameter for parameter, _ in copied]
        self.copies: list[Tensor] = [nn.Parameter(p.detach().to(to), requires_grad=p.requires_grad) for p, to in copied]
        place = {id(parameter): n for n, parameter in enumerate(self._originals)}
        self._holders = [
            (each._parameters, name, place[id(parameter)])
            for each in module.modules()
            for name, parameter in each._parameters.items()
            if id(parameter) in place
        ]
        self._is_in = False
        for original, copy in zip(self._originals, self.copies, strict=True):
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(_hand_on, original))  # type: ignore[no-untyped-call]

    def take_places(self) -> None:
        """Before a forward pass: the module computes with copies of its parameters as they are now."""
        if self._is_in:
            return
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self._originals)
        self._put(self.copies)
        self._is_in = True

    def give_back_after(self, loss: Tensor) -> None:
        """When the gradient of `loss` is complete, the module has its own parameters again, unless the copies stay."""
        if loss.requires_grad and not self.stays:
            loss.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]

    def give_back(self) -> None:
        """The module has its own parameters again."""
        if self._is_in:
            self._put(self._originals)
            self._is_in = False

    def _backward_begins(self, _: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self.give_back)

    def _put(self, parameters: list[Tensor]) -> None:
        for held, name, number in self._holders:
            held[name] = cast(nn.Parameter, parameters[number])


def _hand_on(original: Tensor, copy: Tensor) -> None:
    """Add the copy's gradient to that of the parameter, in the parameter's type."""
    assert copy.grad is not None
    if original.grad is None:
        original.grad = copy.grad.to(original.dtype)
    else:
        original.grad.add_(copy.grad)
    copy.grad = None
