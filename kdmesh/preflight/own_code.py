"""Finds what is wrong with functions and classes of the user's own, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from kdmesh.extension import search_path


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
    if name not in defined:
        yield f"{where}: {spec.origin} defines no {name!r}"
        return
    match defined[name]:
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


def _definitions(source: Path) -> dict[str, ast.AST]:
    """Top-level names of a module: functions, classes, assignments, imports."""
    names: dict[str, ast.AST] = {}
    for node in ast.parse(source.read_text(encoding="utf-8"), str(source)).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names[node.name] = node
            case ast.Assign(targets=targets):
                names.update({target.id: node for target in targets if isinstance(target, ast.Name)})
            case ast.AnnAssign(target=ast.Name(id=name)):
                names[name] = node
            case ast.Import() | ast.ImportFrom():
                names.update({alias.asname or alias.name: node for alias in node.names})
    return names


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
