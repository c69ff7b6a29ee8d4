"""From a configuration to a cache."""

from __future__ import annotations

from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import assert_never

from kdmesh.errors import ConfigError
from kdmesh.handles.slab.memory import require_available
from kdmesh_teacher import config
from kdmesh_teacher.cache.config import CacheConfig
from kdmesh_teacher.cache.directory import RowDirectory, opened
from kdmesh_teacher.cache.keys import RowKeys
from kdmesh_teacher.cache.memory import MemoryTier
from kdmesh_teacher.cache.row_cache import RowCache
from kdmesh_teacher.engine import EngineDescription
from kdmesh_teacher.sglang import config as sglang_config


def open_directory(cfg: CacheConfig, stack: AsyncExitStack) -> RowDirectory | None:
    """The directory, if one is configured, until `stack` ends. Blocks.

    Raises:
        ConfigError: it cannot be used, or this machine has less memory than is to be kept.
    """
    try:
        require_available(cfg.memory_bytes)
    except OSError as error:
        raise ConfigError(f"cache.memory_mib: {error.strerror}") from None
    return None if cfg.directory is None else stack.enter_context(opened(cfg.directory, cfg.directory_bytes))


def open_cache(
    cfg: CacheConfig,
    engine: config.EngineConfig,
    model: EngineDescription,
    directory: RowDirectory | None,
    stack: AsyncExitStack,
) -> RowCache | None:
    """The cache for rows of this model; None when nothing is to be kept. Its last writes are made when `stack` ends."""
    if not cfg.is_on:
        return None
    cache = RowCache(
        RowKeys(model, shared=cfg.shared, computed_by=_computed_by(engine)),
        MemoryTier(cfg.memory_bytes) if cfg.memory_bytes else None,
        directory,
    )
    stack.push_async_callback(cache.close)
    return cache


def _computed_by(engine: config.EngineConfig) -> dict[str, str]:
    """What decides the bits of a row besides the model."""
    match engine:
        case config.TransformersEngine():
            return {"engine": engine.kind, "device": engine.device, **_releases("torch", "transformers")}
        case sglang_config.SglangEngine():
            return {"engine": engine.kind, **_releases("torch", "sglang")}
        case config.FakeEngine():
            return {"engine": engine.kind}
        case _:
            assert_never(engine)


def _releases(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
