"""Functions named in a configuration are refused by name before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdmesh.errors import ConfigError
from kdmesh.extension import resolve

MODULE = """
calls = []
def reader(path, *, limit=3):
    calls.append(path)
    return [path, limit]
def divergence(log_q, log_p, *, alpha): return (log_q, log_p, alpha)
def nothing(): return 1
def open_ended(*args, **kwargs): return (args, kwargs)
def positional(a, /): return a
value = 3
"""


@pytest.fixture(scope="module", autouse=True)
def extension_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory: Path = tmp_path_factory.mktemp("extension")
    (directory / "kdmesh_extension_sample.py").write_text(MODULE)
    (directory / "kdmesh_extension_broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield


def find(name: str, params: dict[str, Any], num_arguments: int = 0) -> Any:
    return resolve(f"kdmesh_extension_sample:{name}", params, num_arguments=num_arguments)


def test_params_are_bound_and_the_function_is_not_called_yet() -> None:
    import kdmesh_extension_sample as module  # type: ignore[import-not-found]

    module.calls.clear()
    bound = find("reader", {"path": "x"})
    assert module.calls == []
    assert bound() == ["x", 3]
    assert find("divergence", {"alpha": 2}, 2)("q", "p") == ("q", "p", 2)
    assert find("open_ended", {"x": 1}, 2)(1, 2) == ((1, 2), {"x": 1})


@pytest.mark.parametrize(
    ("name", "params", "num_arguments", "message"),
    [
        ("reader", {}, 0, "missing params: path"),
        ("reader", {"path": 1, "limits": 2, "more": 3}, 0, "unknown params: limits, more"),
        ("reader", {"limits": 2}, 0, "unknown params: limits; missing params: path"),
        ("divergence", {"alpha": 1, "log_q": 2}, 2, "unknown params: log_q"),
        ("divergence", {}, 2, "missing params: alpha"),
        ("positional", {"a": 1}, 0, "missing params: a"),
        ("nothing", {}, 2, "must take 2 positional arguments, it takes 0"),
        ("absent", {}, 0, "has no function 'absent'"),
        ("value", {}, 0, "has no function 'value'"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused_by_name(
    name: str, params: dict[str, Any], num_arguments: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find(name, params, num_arguments)


def test_a_module_in_the_working_directory_is_found_however_python_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kdmesh_extension_here.py").write_text("from kdmesh_extension_beside import value as found\n")
    (tmp_path / "kdmesh_extension_beside.py").write_text("def value(): return 3\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as under `python -P`
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in sys.path
    assert resolve("kdmesh_extension_here:found", {})() == 3


@pytest.mark.parametrize("module", ["kdmesh_extension_absent", "kdmesh_extension_broken", ".relative", ""])
def test_a_module_that_cannot_be_imported_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match="cannot import"):
        resolve(f"{module}:reader", {})


def test_a_function_without_a_signature_is_refused() -> None:
    with pytest.raises(ConfigError, match="no signature"):
        resolve("builtins:iter", {})
