"""Which versions of SGLang the hooks were tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from kdmesh.errors import ConfigError

TESTED = ("0.5.23",)
"""tests/sglang passes with these."""


def require_tested_version() -> None:
    """Raises ConfigError when SGLang is missing, or another version than was tested."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise ConfigError("engine.kind is sglang, which is not installed: pip install 'kdmesh[sglang]'") from None
    if found not in TESTED:
        raise ConfigError(
            f"SGLang {found} is installed; kdmesh's hooks into it were tested with {', '.join(TESTED)}, and may read "
            "other numbers in another version"
        )
