"""Loads a typed, closed configuration from YAML and `--set` overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from kdmesh.errors import ConfigError


class StrictModel(BaseModel):
    """A frozen section of a configuration: an unknown key is an error, a docstring is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _from_home(cls, value: Any) -> Any:
        """A path that begins with ~ is one in the user's home, as in a shell."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError("there is no such home") from None


class _Loader(yaml.SafeLoader):
    """YAML as its readers expect it: a key is there once, and 1e-5 is a number, which YAML 1.1 takes for a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a key that is there twice."""
        seen = set()
        for key, _ in node.value:
            told = key.tag, str(key.value)
            if told in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(told)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


M = TypeVar("M", bound=StrictModel)


def config_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m module`, which takes a configuration's path as `config` and overrides as `set`, for `load`."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("config", type=Path, help=f"YAML file; see {module.partition('.')[0]}/config.py")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; may be repeated"
    )
    return parser


def load(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """The configuration in `path`, with each override `a.b=value` (value is YAML) laid over it.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or any key is bad;
            every bad key is named, with its path.
    """
    return parse(model, read_tree(path, overrides), source=path)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `path` says after the overrides, as plain values. Raises ConfigError like `load`, but checks no key."""
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    return tree


def parse(model: type[M], tree: dict[str, Any], *, source: Path) -> M:
    """The typed form of `tree`, which was read from `source`. Raises ConfigError with every bad key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_line(details) for details in error.errors()]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{source}: {count}", *lines])) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override!r} is not of the form a.b=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {text!r} is not YAML") from None
    *parents, last = dotted.split(".")
    node = tree
    for key in parents:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {key!r} is not a section")
        node = child
    node[last] = value


def _line(details: ErrorDetails) -> str:
    message, value = details["msg"].removeprefix("Value error, "), details["input"]
    if not details["loc"]:  # a rule of several keys, which it names
        return f"  {message}"
    dotted = ".".join(str(part) for part in details["loc"])
    if details["type"] == "tuple_type":
        message = "give a list, as [first, second]"
    if details["type"] == "union_tag_not_found":
        message = f"says no {details['ctx']['discriminator']}, which decides what else belongs here"
    if details["type"] == "extra_forbidden":
        message = "there is no such key"
    if isinstance(value, dict | list):
        return f"  {dotted}: {message}"
    return f"  {dotted}: {message} (got {value!r})"
