"""Finds what is wrong with functions and classes of the user's own, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from kdmesh.extension import search_path

_OF_ANY_NAME = ("*", "__getattr__")  # a module with one of these may have names that its source does not tell


def function_problems(
    key: str,
    target: str,
    params: Mapping[str, object],
    *,
    positional: int,
    is_class: bool = False,
    target_key: str = "",
) -> Iterator[str]:
    """What is wrong with `module:function`, read from its source: importing it could load anything.

    Args:
        key: of the section that names it, for its `params`.
        positional: arguments that it is given by their place.
        target_key: of the configuration; empty: it is `target` of the section.
    """
    where = target_key or f"{key}.target"
    module, _, name = target.partition(":")
    spec = _find(module)
    if spec is None:
        yield f"{where}: there is no module {module!r} (the working directory is searched too)"
        return
    if not spec.origin or not spec.origin.endswith(".py"):
        return  # compiled: only importing can tell
    try:
        defined = _definitions(Path(spec.origin))
    except SyntaxError as error:
        yield f"{where}: {spec.origin} is not Python: {error.msg} in line {error.lineno}"
        return
    if not defined.keys() & {name, *_OF_ANY_NAME}:
        yield f"{where}: {spec.origin} defines no {name!r}"
        return
    match defined.get(name):
        case ast.FunctionDef() if is_class:
            yield f"{where}: {name} is a function, and must be a class"
        case ast.FunctionDef() as function:
            yield from (f"{key}.params: {problem}" for problem in _misfits(name, function, params, positional))
        case ast.ClassDef() as defined_class:
            for method in defined_class.body:  # an inherited one can only be known by importing
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    problems = _misfits(name, method, params, positional + 1)
                    yield from (f"{key}.params: {problem}" for problem in problems)


def _find(module: str) -> ModuleSpec | None:
    """The module's spec, found as the import system would, but without importing its parents."""
    path = search_path()
    *parents, last = module.split(".")
    for parent in parents:
        # Not by its full name: a directory without __init__.py would look for its parents among the imported.
        spec = PathFinder.find_spec(parent, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return PathFinder.find_spec(last, path)


def _definitions(source: Path) -> dict[str, ast.stmt]:
    """Names of a module, each with its last statement that binds it, which may be a block of others."""
    names: dict[str, ast.stmt] = {}
    for statement in ast.parse(source.read_bytes(), str(source)).body:
        bound = _Bound()
        bound.visit(statement)
        names.update(dict.fromkeys(bound.names, statement))
    return names


class _Bound(ast.NodeVisitor):
    """The names that a statement binds, at any depth but for the inside of functions and classes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.names.add(node.name)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.names.add(node.id)

    def visit_alias(self, node: ast.alias) -> None:
        self.names.add(node.asname or node.name)


def _misfits(name: str, function: ast.FunctionDef, params: Mapping[str, object], positional: int) -> Iterator[str]:
    """Parameters that the function lacks, and those it requires; its first `positional` ones are filled by us."""
    arguments = function.args
    in_order = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    required = set(in_order[positional : len(in_order) - len(arguments.defaults)])
    by_name = {argument.arg for argument in arguments.kwonlyargs}
    by_name |= set(in_order[positional:]) - {argument.arg for argument in arguments.posonlyargs}
    without_default = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required |= {argument.arg for argument, default in without_default if default is None}
    if arguments.kwarg is None:
        yield from (f"{name} has no parameter {param!r}" for param in params.keys() - by_name)
    yield from (f"{name} requires {param!r}" for param in sorted(required - params.keys()))
