"""Which divergences the GPU's row kernel knows, and with which numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

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
    TOP1_CROSS_ENTROPY = 5
    SAMPLED_REVERSE_KL = 6
    RENYI = 7
    JENSEN_SHANNON = 8
    SKEWED_KL = 9
    SKEWED_REVERSE_KL = 10
    TOTAL_VARIATION = 11
    ALPHA_BETA = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelForm:
    """A divergence as the kernel takes it."""

    op: Op
    first: float = 0.0  # the divergence's parameters, in the order of the table below
    second: float = 0.0


# A function and the names of its parameters. What is not here looks at a row as a whole (a sort, a search for a
# threshold) or is the user's own.
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
