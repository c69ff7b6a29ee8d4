"""Finds a divergence by its name or its import path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.extension import resolve
from kdmesh.losses import divergences, selective
from kdmesh.losses.divergences import Divergence
from kdmesh.losses.sampled import SampledDivergence, sampled_reverse_kl

# What lies between its parameters' limits, which are themselves left out.
_FRACTION = (0.0, 1.0)
_POSITIVE = (0.0, math.inf)
_BUILT_IN: Mapping[str, tuple[Any, Mapping[str, tuple[float, float]]]] = {
    "forward_kl": (divergences.forward_kl, {}),
    "reverse_kl": (divergences.reverse_kl, {}),
    "jensen_shannon": (divergences.jensen_shannon, {"beta": _FRACTION}),
    "skewed_kl": (divergences.skewed_kl, {"skew": _FRACTION}),
    "skewed_reverse_kl": (divergences.skewed_reverse_kl, {"skew": _FRACTION}),
    "total_variation": (divergences.total_variation, {}),
    "renyi": (divergences.renyi, {"order": _POSITIVE}),
    "alpha_beta": (divergences.alpha_beta, {"alpha": _POSITIVE, "beta": _POSITIVE}),
    "adaptive_kl": (selective.adaptive_kl, {"tail_mass": _FRACTION}),
    "masked_reverse_kl": (selective.masked_reverse_kl, {}),
    "entropy_gated_kl": (selective.entropy_gated_kl, {"threshold": _POSITIVE, "forward_weight": _POSITIVE}),
    "top1_cross_entropy": (selective.top1_cross_entropy, {}),
    "hierarchical_ranking": (selective.hierarchical_ranking, {"top_k": (1, math.inf)}),
}
_SAMPLED = {"sampled_reverse_kl": sampled_reverse_kl}


def build_divergence(name: str, params: Mapping[str, Any] | None = None) -> Divergence | SampledDivergence:
    """The built-in divergence `name`, with its own parameters bound and no others.

    Raises:
        ConfigError: the name is unknown, or the parameters are unknown, missing or out of range.
    """
    params = params or {}
    if name in _SAMPLED and not params:
        return SampledDivergence(_SAMPLED[name])
    if name not in _BUILT_IN:
        raise ConfigError(f"unknown divergence {name!r}; known: {', '.join([*_BUILT_IN, *_SAMPLED])}")
    function, limits = _BUILT_IN[name]
    divergence: Divergence = resolve(f"{function.__module__}:{name}", params, num_arguments=2)
    for param, (low, high) in limits.items():
        if not low < params[param] < high:
            below = "" if high == math.inf else f" and below {high:g}"
            raise ConfigError(f"{param} is {params[param]}; {name} takes one above {low:g}{below}")
    if params.get("order") == 1:
        raise ConfigError("order is 1, which is forward_kl")
    return divergence


def custom_divergence(target: str, params: Mapping[str, Any]) -> Divergence:
    """The divergence at `target` with `params` bound; its form is described at `divergences.Divergence`.

    It raises InvalidRequest when it is called and what it returns has the wrong shape.

    Args:
        target: "module:function"; the module is imported, the function is not called.

    Raises:
        ConfigError: it cannot be imported, does not take two arguments, or has unknown or missing params.
    """
    divergence: Divergence = resolve(target, params, num_arguments=2)

    def checked(log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        value_C, h_CV = divergence(log_q_CV, log_p_CV)
        if value_C.shape != log_p_CV.shape[:1] or h_CV.shape != log_p_CV.shape:  # broadcasting would hide it
            raise InvalidRequest(
                f"{target} returned tensors of shapes {tuple(value_C.shape)} and {tuple(h_CV.shape)}; for "
                f"{tuple(log_p_CV.shape)} they must be {tuple(log_p_CV.shape[:1])} and {tuple(log_p_CV.shape)}"
            )
        return value_C, h_CV

    return checked
