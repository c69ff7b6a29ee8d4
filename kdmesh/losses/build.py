"""Finds a divergence by its name or its import path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdmesh.errors import ConfigError, InvalidRequest
from kdmesh.extension import resolve
from kdmesh.losses import divergences
from kdmesh.losses.divergences import Divergence

_BUILT_IN = ("forward_kl", "reverse_kl", "jensen_shannon")


def build_divergence(name: str, params: Mapping[str, Any] | None = None) -> Divergence:
    """The built-in divergence `name`, with its own parameters bound and no others.

    Raises:
        ConfigError: the name is unknown, or the parameters are unknown, missing or out of range.
    """
    if name not in _BUILT_IN:
        raise ConfigError(f"unknown divergence {name!r}; known: {', '.join(_BUILT_IN)}")
    params = params or {}
    divergence: Divergence = resolve(f"{divergences.__name__}:{name}", params, num_arguments=2)
    if name == "jensen_shannon" and not 0 < params["beta"] < 1:
        raise ConfigError(
            f"beta is {params['beta']}; it must be between 0 and 1, whose limits are the two KL divergences"
        )
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
