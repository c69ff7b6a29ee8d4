"""The output head: what turns a final hidden state into logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdmesh.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputHead:
    """Logits follow as z = logit_scale * (W h + b), then cap * tanh(z / cap) where there is a soft cap.

    The tensors are borrowed, never copied; a student's carry its gradient.

    Raises:
        InvalidRequest: when the shapes or constants do not have the form stated here.
    """

    weight_VD: Tensor  # [V, D] any float dtype
    bias_V: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # > 0

    def __post_init__(self) -> None:
        if self.weight_VD.ndim != 2:
            raise InvalidRequest(f"an output head's weight has shape {tuple(self.weight_VD.shape)}; it needs [V, D]")
        if self.bias_V is not None and self.bias_V.shape != (self.vocabulary_size,):
            raise InvalidRequest(
                f"an output head's bias has shape {tuple(self.bias_V.shape)}; it needs [{self.vocabulary_size}]"
            )
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise InvalidRequest(f"an output head's soft cap is {self.logit_softcap}; it must be positive")

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.weight_VD.shape[1]

    def sliced(self, vocabulary_size: int) -> OutputHead:
        """The head of the first `vocabulary_size` tokens; its tensors are views, gradients flow through them.

        Raises:
            InvalidRequest: when the head has fewer tokens than that.
        """
        if not 0 < vocabulary_size <= self.vocabulary_size:
            raise InvalidRequest(f"a head of {self.vocabulary_size} tokens cannot be cut to {vocabulary_size}")
        if vocabulary_size == self.vocabulary_size:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary_size]
        return replace(self, weight_VD=self.weight_VD[:vocabulary_size], bias_V=bias_V)

    def part(self, first: int, num_tokens: int) -> OutputHead:
        """The head of `num_tokens` tokens from `first` on, which may be none; its tensors are views."""
        bias_V = None if self.bias_V is None else self.bias_V[first : first + num_tokens]
        return replace(self, weight_VD=self.weight_VD[first : first + num_tokens], bias_V=bias_V)

    def selected(self, tokens_S: Tensor) -> OutputHead:
        """The head of these tokens [S] int64, in this order; its tensors are copies, gradients flow through them."""
        bias_S = None if self.bias_V is None else self.bias_V.index_select(0, tokens_S)
        return replace(self, weight_VD=self.weight_VD.index_select(0, tokens_S), bias_V=bias_S)

    def at_temperature(self, temperature: float) -> OutputHead:
        """The head whose logits are these divided by `temperature`."""
        softcap = None if self.logit_softcap is None else self.logit_softcap / temperature
        return replace(self, logit_scale=self.logit_scale / temperature, logit_softcap=softcap)

    def detached(self) -> OutputHead:
        """The same head, carrying no gradient."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] float32 (float64 when either side is), differentiable.

        Materialises the whole matrix: for tests and probes, never for a training step.
        """
        dtype = torch.promote_types(torch.promote_types(hidden_RD.dtype, self.weight_VD.dtype), torch.float32)
        logits_RV = hidden_RD.to(dtype) @ self.weight_VD.to(dtype).T
        if self.bias_V is not None:
            logits_RV = logits_RV + self.bias_V.to(dtype)
        logits_RV = logits_RV * self.logit_scale
        if self.logit_softcap is None:
            return logits_RV
        return self.logit_softcap * torch.tanh(logits_RV / self.logit_softcap)
