"""The start-up comparison with transformers accepts rounding and nothing else. Any engine serves to show it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kdmesh.errors import ConfigError, EngineFailure
from kdmesh.models.checkpoint import open_checkpoint
from kdmesh.sglang import reference
from kdmesh_teacher.config import TransformersEngine as EngineConfig
from kdmesh_teacher.engine import EngineDescription, PrefillJob
from kdmesh_teacher.sglang_reference import check_reference
from kdmesh_teacher.transformers_engine import TransformersEngine
from tests.support.tiny_models import TinyModels


class Shifted(TransformersEngine):
    """Gives each position the row of the one before."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        for job in jobs:
            row_bytes = len(job.out) // job.num_rows
            job.out[row_bytes:] = bytes(job.out[:-row_bytes])


def loaded(engine: TransformersEngine) -> tuple[TransformersEngine, EngineDescription]:
    return engine, engine.load()


def config(model: Path) -> EngineConfig:
    return EngineConfig(model=model, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_agree(tiny_models: TinyModels, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_models.path("qwen3", dtype=dtype)
    with caplog.at_level(logging.INFO):
        check_reference(*loaded(TransformersEngine(config(path))), open_checkpoint(path))
    assert "rows compared" in caplog.messages


def test_other_weights_are_refused(tiny_models: TinyModels) -> None:
    engine, model = loaded(TransformersEngine(config(tiny_models.path("qwen3", seed=1))))
    with pytest.raises(EngineFailure, match="SGLang and transformers disagree"):
        check_reference(engine, model, open_checkpoint(tiny_models.path("qwen3")))


def test_rows_of_the_wrong_position_are_refused(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen3")
    with pytest.raises(EngineFailure, match="disagree"):
        check_reference(*loaded(Shifted(config(path))), open_checkpoint(path))


def test_a_model_that_does_not_fit_twice_is_compared_with_its_first_start(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing_left(size_bytes: int) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(reference, "require_available", nothing_left)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_models.path("qwen3")
    engine, model = loaded(TransformersEngine(config(path)))
    check_reference(engine, model, open_checkpoint(path))
    assert "not compared with transformers" in caplog.messages
    assert "rows compared with nothing, but kept for the next start" in caplog.messages
    check_reference(engine, model, open_checkpoint(path))
    with pytest.raises(EngineFailure, match=rf"SGLang and an earlier start, whose rows {tmp_path}/.* keeps, disagree"):
        check_reference(*loaded(Shifted(config(path))), open_checkpoint(path))


def test_other_weights_of_an_updatable_model_are_compared_with_their_own_first_start(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdmesh_teacher.sglang_reference.transformers_model", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for seed in (0, 1, 0):
        path = tiny_models.path("qwen3", seed=seed)
        engine, model = loaded(TransformersEngine(EngineConfig(model=path, device="cpu", updatable=True)))
        check_reference(engine, model, open_checkpoint(path))
    assert len(list((tmp_path / "kdmesh").iterdir())) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(reference, "load_causal_lm", _unknown)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tiny_models.path("qwen3")
    check_reference(*loaded(TransformersEngine(config(path))), open_checkpoint(path))
    assert "rows compared with nothing" in caplog.messages


def _unknown(*arguments: object) -> None:
    raise ConfigError("transformers does not know it")
