"""Resolves a function that a configuration names, with its parameters checked against its signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from kdmesh.errors import ConfigError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def search_path() -> list[str]:
    """Directories in which a user's module is looked for: the working directory, then where Python looks.

    Whether Python itself looks in the working directory depends on how it was started; relative paths of a
    configuration begin there, and so do its modules.
    """
    here = str(Path.cwd())
    return sys.path if here in sys.path else [here, *sys.path]


def resolve(target: str, params: Mapping[str, Any], *, num_arguments: int = 0) -> Callable[..., Any]:
    """The function at `target` with `params` bound by keyword.

    Args:
        target: "module:function"; the module is imported, the function is not called. From then on
            this process imports from `search_path`.
        num_arguments: positional arguments that the caller will pass first.

    Raises:
        ConfigError: it cannot be imported or called so, or `params` has unknown or missing names.
    """
    function = _find(target)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(f"{target} has no signature to check its params against; wrap it in a function") from None
    parameters = list(signature.parameters.values())
    ours = [p for p in parameters if p.kind in _POSITIONAL][:num_arguments]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(ours) < num_arguments and not takes_any:
        raise ConfigError(f"{target}{signature} must take {num_arguments} positional arguments, it takes {len(ours)}")
    _check_names(f"{target}{signature}", [p for p in parameters if p not in ours], params)
    return partial(function, **params)


def _find(target: str) -> Callable[..., Any]:
    module_name, _, name = target.partition(":")
    sys.path[:] = search_path()
    try:
        module = import_module(module_name)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:  # the last two: not a module name
        raise ConfigError(f"{target}: cannot import {module_name}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{target}: {module_name} has no function {name!r}")
    found: Callable[..., Any] = function
    return found


def _check_names(shown: str, parameters: list[inspect.Parameter], params: Mapping[str, Any]) -> None:
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [] if takes_any else sorted(set(params) - {p.name for p in by_keyword})
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in needed if p not in by_keyword or p.name not in params]
    problems = [
        f"{kind} params: {', '.join(names)}" for kind, names in (("unknown", unknown), ("missing", missing)) if names
    ]
    if problems:
        raise ConfigError(f"{shown}: {'; '.join(problems)}")
