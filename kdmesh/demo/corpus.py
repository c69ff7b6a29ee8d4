"""Turns the Python standard library of this machine into chats: a function, and the docstring it had."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests are repetitive, the others are no library: tables, toys, or somebody else's packages.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_REQUEST = "Write the docstring of this function."
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Which functions are taken, by their length in characters."""

    max_source: int  # signature and body, without the docstring
    max_docstring: int  # its first paragraph, which is the answer
    min_docstring: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One function of the library."""

    module: str
    source: str  # dedented, without its docstring
    docstring: str  # its first paragraph, on one line

    def chat(self) -> dict[str, object]:
        """The row of a chat dataset."""
        return {
            "messages": [
                {"role": "user", "content": f"{_REQUEST}\n\n{self.source}"},
                {"role": "assistant", "content": self.docstring},
            ]
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Examples, split by module so that nothing held out has a sibling in training."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]

    def digest(self) -> str:
        """Changes when any example, its place or its side does."""
        text = json.dumps([[example.chat() for example in side] for side in (self.train, self.held_out)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def write(self, directory: Path) -> None:
        """Write train.jsonl and held_out.jsonl."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, side in (("train", self.train), ("held_out", self.held_out)):
            lines = "".join(json.dumps(example.chat()) + "\n" for example in side)
            (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def build_corpus(sizes: Sizes, *, library: Path | None = None) -> Corpus:
    """The documented functions of `library` that fit, each once, in an order that depends on nothing else.

    Args:
        library: directory of Python sources; unset takes the running interpreter's standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if library is None else library
    train: list[Example] = []
    held_out: list[Example] = []
    seen: set[str] = set()
    for path in _sources(root):
        module = _module_name(path.relative_to(root))
        for example in _examples(module, path.read_bytes(), sizes):
            if example.source not in seen:
                seen.add(example.source)
                (held_out if _is_held_out(module) else train).append(example)
    return Corpus(train=_shuffled(train), held_out=_shuffled(held_out))


def _sources(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(set(names) - _SKIPPED)
        yield from (Path(directory, file) for file in sorted(files) if file.endswith(".py"))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _examples(module: str, source: bytes, sizes: Sizes) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not our business
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # some modules hold bad syntax on purpose
    lines = source.decode("utf-8", errors="replace").splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            example = _example(module, node, lines, sizes)
            if example is not None:
                yield example


def _example(
    module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str], sizes: Sizes
) -> Example | None:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    answer = docstring.strip()
    # By line numbers, not by columns: those count bytes. What stands before and after the docstring is kept.
    text = node.body[0]
    assert text.end_lineno is not None
    without = [*lines[node.lineno - 1 : text.lineno - 1], *lines[text.end_lineno : node.end_lineno]]
    code = textwrap.dedent("\n".join(line.rstrip() for line in without)).strip()
    fits = len(code) <= sizes.max_source and sizes.min_docstring <= len(answer) <= sizes.max_docstring
    return Example(module=module, source=code, docstring=answer) if fits else None


def _is_held_out(module: str) -> bool:
    return int(hashlib.blake2b(module.encode(), digest_size=4).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0


def _shuffled(examples: Sequence[Example]) -> tuple[Example, ...]:
    """By a digest of each source, so that neighbours in the files are not neighbours in the library."""
    return tuple(sorted(examples, key=lambda example: hashlib.blake2b(example.source.encode()).digest()))
