"""Finds a divergence by its name or its import path."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from kdmesh.errors import ConfigError
from kdmesh.losses.divergences import Divergence, forward_kl, jensen_shannon, reverse_kl


def build_divergence(name: str, params: Mapping[str, Any] | None = None) -> Divergence:
    """The built-in divergence `name` with `params` bound.

    Raises:
        ConfigError: unknown name, or unknown, missing or out-of-range parameters.
    """
    params = params or {}
    match name:
        case "forward_kl":
            return forward_kl
        case "reverse_kl":
            return reverse_kl
        case "jensen_shannon":
            return partial(jensen_shannon, **params)
        case _:
            raise ConfigError(f"unknown divergence {name!r}")


def custom_divergence(target: str, params: Mapping[str, Any]) -> Divergence:
    """The divergence at `target` ("module:function") with `params` bound.

    Raises:
        ConfigError: it cannot be imported, is not callable, or `params` do not fit its signature.
    """
    from importlib import import_module

    module, _, attribute = target.partition(":")
    return partial(getattr(import_module(module), attribute), **params)
