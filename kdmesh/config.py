"""Loads a typed, closed configuration from YAML and `--set` overrides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence, Set
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from yaml.error import MarkedYAMLError

from kdmesh.errors import ConfigError
from kdmesh.hub import made_local, named_in
from kdmesh.plain_yaml import Loader


class StrictModel(BaseModel):
    """A frozen section of a configuration: an unknown key is an error, a docstring is its description.

    Attributes:
        other_names: of a whole configuration, what keys are called elsewhere, for who writes those: the keys to write.
    """

    other_names: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _taken_for_itself(cls, section: Any) -> Any:
        """true is not the number 1, and an empty text not the directory that a command runs in, as pydantic has it."""
        if not isinstance(section, dict):
            return section
        fields = cls.model_fields
        return {
            key: _with_misfits(value, _types(fields[key].annotation)) if key in fields else value
            for key, value in section.items()
        }

    @field_validator("*", mode="after")
    @classmethod
    def _from_home(cls, value: Any) -> Any:
        """A path that begins with ~ is one in the user's home, as in a shell."""
        if not isinstance(value, Path):
            return value
        try:
            path = value.expanduser()
            is_possible = b"\0" not in os.fsencode(path)
        except RuntimeError:
            raise ValueError("there is no such home") from None
        except UnicodeEncodeError:
            is_possible = False
        if not is_possible:
            raise ValueError("it has a character that no path can have")
        return path


class BrokenRules(ValueError):
    """What a validator of a whole configuration raises for several of its rules at once."""

    def __init__(self, rules: Sequence[str]) -> None:
        """`rules` says of each, in a sentence, which keys break it."""
        super().__init__("; ".join(rules))
        self.rules = rules


class _Misfit:
    """A value of a kind that pydantic would take for another one. It takes this for nothing."""

    def __init__(self, value: object) -> None:
        self.value = value


def _with_misfits(value: object, types: Set[Any]) -> object:
    """`value`, or in a list or mapping its parts, as a `_Misfit` where pydantic would make another kind of it."""
    if not types:  # nor may a part be anything
        return value
    if isinstance(value, bool):
        return _Misfit(value) if bool not in types and not types.isdisjoint((int, float)) else value
    if value == "" and Path in types:
        return _Misfit(value)
    if isinstance(value, list):
        parts = {part for each in types if get_origin(each) in (tuple, list) for part in get_args(each)}
        return [_with_misfits(part, set().union(*map(_types, parts))) for part in value]
    if isinstance(value, dict):
        held = {get_args(each)[1] for each in types if get_origin(each) is dict}
        return {key: _with_misfits(part, set().union(*map(_types, held))) for key, part in value.items()}
    return value


def _types(annotation: Any) -> set[Any]:
    """All that a value with this annotation may be, but for what is inside lists and sections."""
    choices = () if get_origin(annotation) in (dict, tuple, list) else get_args(annotation)
    return {annotation}.union(*map(_types, choices))


M = TypeVar("M", bound=StrictModel)

_MOST_GUESSES = 3


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


def named_value(text: str) -> tuple[str | None, Any]:
    """Of NAME=VALUE, the value read as YAML; no name: it is not of that form."""
    name, equals, value = text.partition("=")
    try:
        return (name if name and equals else None), yaml.load(value, Loader)
    except (yaml.YAMLError, RecursionError):
        return None, None


def parse(model: type[M], tree: dict[str, Any], *, source: Path, fetch: bool = True) -> M:
    """The typed form of `tree`, which was read from `source`.

    Args:
        fetch: whether to fetch what `hf://` names and is not here yet; otherwise it stays a path that is not there.

    Raises:
        ConfigError: with every bad key.
    """
    try:
        parsed = model.model_validate(tree)
        # Only what is good so far is worth to be fetched.
        return model.model_validate(made_local(tree, fetch=fetch)) if any(named_in(tree)) else parsed
    except ValidationError as error:
        lines = problems(error, tree, model)
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{source}: {count}", *(f"  {line}" for line in lines)])) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_words(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} has lists or sections in each other, too many to be read") from None
    if tree is None:
        raise ConfigError(f"{path} says nothing; it must hold keys with values, as `steps: 100`")
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"only {_as_yaml(tree)}"
        raise ConfigError(f"{path} must hold keys with values, as `steps: 100`, and not {kind}")
    return tree


def _yaml_words(error: yaml.YAMLError) -> str:
    """What is wrong with a file and in which line; a tab, which an editor may not show, in words of our own."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, problem = error.problem_mark, error.problem or "it cannot be read"
    if "'\\t' that cannot start any token" in problem:
        problem = "a tab, where YAML takes spaces alone"
    begun = error.context_mark  # of what does not go on as it must, where that is said
    context = f"{error.context} that begins in line {begun.line + 1}, " if error.context and begun else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {context}{problem}\n{mark.get_snippet()}"


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override!r} is not of the form a.b=value")
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"--set {override!r}: {text!r} is not YAML") from None
    *parents, last = dotted.split(".")
    node = tree
    for key in parents:
        if node.get(key) is None:  # an option that is off is a section that is not there
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(f"--set {override!r}: {key!r} is not a section")
        node[key] = dict(node[key])  # which an alias may have put elsewhere, too
        node = node[key]
    node[last] = value


_A_SECTION = "give a section, as {key: value}"
_SAID = {
    "tuple_type": "give a list, as [first, second]",
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), _A_SECTION),
    "path_type": "give a path",
    "string_type": "give a text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "give a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "give a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "give true or false"),
    "missing": "is required",
}
"""What to say of pydantic's types of errors, where its own words are about Python."""

_SAY_CHOICES = ("name", "kind", "format")  # keys that say which of several a section is


def problems(error: ValidationError, tree: dict[str, Any], model: type[StrictModel]) -> list[str]:
    """One sentence for each: of a value that may be of several kinds, pydantic says why it is none of each."""
    errors = error.errors()
    broken = errors[0].get("ctx", {}).get("error")
    if isinstance(broken, BrokenRules):  # which nobody looks at before every key is good
        return list(broken.rules)
    messages: dict[tuple[str, str], list[str]] = {}
    for details in errors:
        where, message, got = _where_message_got(details, tree, model)
        said = messages.setdefault((where, got), [])
        if message not in said:
            said.append(message)
    return [f"{where}{', or '.join(said)}{got}" for (where, got), said in messages.items()]


def _where_message_got(details: ErrorDetails, tree: dict[str, Any], model: type[StrictModel]) -> tuple[str, str, str]:
    """Of what is wrong: the keys and a colon, the rule, and what was given in brackets."""
    value, kind, location = details["input"], details["type"], details["loc"]
    if not location:  # a rule of several keys, which it names
        return "", _rule(details, value), ""
    is_key = kind == "invalid_key" or location[-1] == "[key]"
    if is_key and kind in ("invalid_key", "string_type"):
        keys, _ = _keys_and_choice(location[: -1 if kind == "invalid_key" else -2], tree, is_missing=False)
        return _where(keys), f"the key {_as_yaml(value)}: give a text, in quotes", ""
    keys, choice = _keys_and_choice(location, tree, is_missing=kind == "missing")
    if kind == "extra_forbidden":
        return _where(keys), "there is no such key" + (f" for {choice}" if choice else "") + _meant(keys, model), ""
    if kind == "union_tag_invalid":
        decides = details["ctx"]["discriminator"].strip("'")
        keys, value = [*keys, decides], value[decides]
    value = value.value if isinstance(value, _Misfit) else value
    rule = _rule(details, value) + (", as the key" if is_key else "")
    if rule == _A_SECTION and value is None and len(keys) == 1 and not model.model_fields[keys[0]].is_required():
        rule += ", or leave it out"
    is_of_parts = isinstance(value, dict | list) and not kind.endswith("_type") and kind not in _OF_A_WHOLE_VALUE
    return _where(keys), rule, "" if is_of_parts else f" (got {_as_yaml(value)})"


def _rule(details: ErrorDetails, value: Any) -> str:
    """The one that `value` breaks, in words of a configuration."""
    kind = details["type"]
    said = _SAID.get(kind, details["msg"].removeprefix("Value error, "))
    match kind:
        case "too_short":
            least = details["ctx"]["min_length"]
            return f"needs at least {least} item{'s' if least > 1 else ''}"
        case "union_tag_invalid":
            return f"must be one of {details['ctx']['expected_tags']}"
        case "union_tag_not_found" if isinstance(value, dict):
            return f"says no {details['ctx']['discriminator']}, which decides what else belongs here"
        case "union_tag_not_found":
            return _A_SECTION
        case "string_type" | "path_type" if not isinstance(value, dict | list | str | None):
            return f"{said}, in quotes: YAML takes it for something else without them"
    return said


_OF_A_WHOLE_VALUE = ("literal_error", "union_tag_invalid")
"""pydantic's types of errors, beside those in `_type`, by which a list or a section is none of what may be."""


def _where(keys: Sequence[str]) -> str:
    return f"{'.'.join(keys)}: " if keys else ""


def _as_yaml(value: Any) -> str:
    """As a person has written it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return "a list"
        case dict():
            return "a section"
        case date():
            return str(value)
        case _:
            return repr(value)


def _keys_and_choice(
    location: Sequence[str | int], tree: dict[str, Any], *, is_missing: bool
) -> tuple[list[str], str | None]:
    """The keys in `location` as the file has them, and the choice of a union that stands before the last one.

    pydantic's locations also name the choices of unions, which are no keys.
    """
    keys: list[str] = []
    node: Any = tree
    choice = None
    for place, part in enumerate(location):
        if isinstance(node, dict):
            is_there = part in node
        else:
            is_there = isinstance(node, list) and isinstance(part, int) and part < len(node)
        # A choice comes before any key of its section, one of which may be called the same.
        if is_there and choice is None and isinstance(node, dict) and part in map(node.get, _SAY_CHOICES):
            is_there = False
        if not is_there and not (is_missing and place == len(location) - 1):
            choice = str(part)
            continue
        choice = None if place < len(location) - 1 else choice
        keys.append(str(part))
        node = node[part] if is_there else None
    return keys, choice


def _meant(keys: Sequence[str], model: type[StrictModel]) -> str:
    """What to write in place of a key that there is not, where that can be guessed."""
    known = key_paths(model)
    *parent, last = keys
    beside = {path[-1] for path in known if list(path[:-1]) == parent}
    if last in beside:  # with another choice
        return ""
    if last in model.other_names:
        return f"; did you mean {model.other_names[last]}?"
    name, colon, _ = last.partition(":")
    if colon and name in beside:
        return f"; did you mean {'.'.join([*parent, name])}, with a space behind its colon?"
    close = get_close_matches(last, beside, n=1)
    meant = [".".join([*parent, *close])] if close else sorted(".".join(path) for path in known if path[-1] == last)
    return f"; did you mean {' or '.join(meant)}?" if 0 < len(meant) <= _MOST_GUESSES else ""


def key_paths(annotation: Any, *, within: tuple[Any, ...] = ()) -> set[tuple[str, ...]]:
    """All keys of what is annotated so, each with those of the sections that it is in; not those of named sections."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        choices = () if get_origin(annotation) in (dict, tuple, list) else get_args(annotation)
        return {path for choice in choices for path in key_paths(choice, within=within)}
    if annotation in within:
        return set()
    fields = annotation.model_fields.items()
    return {
        (name, *path)
        for name, field in fields
        for path in ((), *key_paths(field.annotation, within=(*within, annotation)))
    }
