"""From the configuration to the engine it names."""

from __future__ import annotations

from typing import assert_never

from kdmesh_rollout import config
from kdmesh_rollout.engine import Engine
from kdmesh_rollout.sglang import config as sglang_config


def build_engine(cfg: config.EngineConfig) -> Engine:
    """The engine, not loaded yet. Imports only what this engine needs."""
    match cfg:
        case config.TransformersEngine():
            from kdmesh_rollout.transformers_engine import TransformersEngine

            return TransformersEngine(cfg)
        case sglang_config.SglangEngine():
            from kdmesh_rollout.sglang.engine import SglangEngine

            return SglangEngine(cfg)
        case config.FakeEngine():
            from kdmesh_rollout.fake_engine import FakeEngine

            return FakeEngine(cfg)
        case _:
            assert_never(cfg)
