"""Which divergences the GPU's row kernel knows, with which numbers, and where the GPU's kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from kdmesh.losses import divergences, selective
from kdmesh.losses.divergences import Divergence
from kdmesh.losses.sampled import SampledDivergence, sampled_reverse_kl


class Op(IntEnum):
    """What the kernel computes besides cross-entropy."""

    NOTHING = 0
    FORWARD_KL = 1
    REVERSE_KL = 2
    MASKED_REVERSE_KL = 3
    ENTROPY_GATED_KL = 4
    ADAPTIVE_KL = 5
    TOP1_CROSS_ENTROPY = 6
    SAMPLED_REVERSE_KL = 7
    RENYI = 8
    JENSEN_SHANNON = 9
    SKEWED_KL = 10
    SKEWED_REVERSE_KL = 11
    TOTAL_VARIATION = 12
    ALPHA_BETA = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelForm:
    """A divergence as the kernel takes it."""

    op: Op
    first: float = 0.0  # the divergence's parameters, in the order of the table below
    second: float = 0.0


# A function and the names of its parameters. What is not here sorts a row, or is the user's own.
_FORMS: Mapping[Callable[..., Any], tuple[Op, tuple[str, ...]]] = {
    divergences.forward_kl: (Op.FORWARD_KL, ()),
    divergences.reverse_kl: (Op.REVERSE_KL, ()),
    divergences.jensen_shannon: (Op.JENSEN_SHANNON, ("beta",)),
    divergences.skewed_kl: (Op.SKEWED_KL, ("skew",)),
    divergences.skewed_reverse_kl: (Op.SKEWED_REVERSE_KL, ("skew",)),
    divergences.total_variation: (Op.TOTAL_VARIATION, ()),
    divergences.renyi: (Op.RENYI, ("order",)),
    divergences.alpha_beta: (Op.ALPHA_BETA, ("alpha", "beta")),
    selective.masked_reverse_kl: (Op.MASKED_REVERSE_KL, ()),
    selective.adaptive_kl: (Op.ADAPTIVE_KL, ("tail_mass",)),
    selective.entropy_gated_kl: (Op.ENTROPY_GATED_KL, ("threshold", "forward_weight")),
    selective.top1_cross_entropy: (Op.TOP1_CROSS_ENTROPY, ()),
    sampled_reverse_kl: (Op.SAMPLED_REVERSE_KL, ()),
}


def kernel_form(divergence: Divergence | SampledDivergence) -> KernelForm | None:
    """The form of a divergence, from `build_divergence` or the function itself; None where the kernel has none."""
    function: Any = divergence.function if isinstance(divergence, SampledDivergence) else divergence
    params: Mapping[str, float] = {}
    if isinstance(function, partial):
        function, params = function.func, function.keywords
    if function not in _FORMS:
        return None
    op, names = _FORMS[function]
    if set(names) != set(params):
        return None
    return KernelForm(op=op, **dict(zip(("first", "second"), (params[name] for name in names), strict=False)))


def kernel_runs_on(device: torch.device) -> bool:
    """Whether there is Triton for tensors there: on a GPU, and in its interpreter where that was asked for."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or is_interpreted) and find_spec("triton") is not None
