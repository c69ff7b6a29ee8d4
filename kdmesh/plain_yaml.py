"""YAML as its readers expect it: a key is there once, and 1e-5 is a number, which YAML 1.1 takes for a text."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_FLOAT = "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")


class UniqueKeysLoader(yaml.SafeLoader):
    """Refuses what says a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ConstructorError for a key that is there twice."""
        seen = set()
        for key, _ in node.value:
            told = key.tag, str(key.value)
            if told in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(told)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Raises ConstructorError for what looks like a date or a number and is none, as 2026-13-01."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            raise ConstructorError(None, None, f"{node.tag.rpartition(':')[2]}: {error}", node.start_mark) from None


class Loader(UniqueKeysLoader):
    """Of configurations."""


class Dumper(yaml.SafeDumper):
    """Puts in quotes what `Loader`, or another reader of YAML 1.2, would take for a number."""


Loader.add_implicit_resolver(*_FLOAT)
Dumper.add_implicit_resolver(*_FLOAT)
