"""The start-up comparison with transformers accepts rounding and nothing else. Any engine serves to show it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kdmesh.errors import ConfigError, EngineFailure
from kdmesh.models.checkpoint import open_checkpoint
from kdmesh.sglang import reference
from kdmesh_teacher.config import TransformersEngine as EngineConfig
from kdmesh_teacher.engine import EngineDescription, PrefillJob
from kdmesh_teacher.sglang.reference import check_reference
from kdmesh_teacher.transformers_engine import TransformersEngine
from tests.support.tiny_models import TinyModels


class Shifted(TransformersEngine):
    """Gives each position the row of the one before."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        for job in jobs:
            row_bytes = len(job.out) // job.num_rows
            job.out[row_bytes:] = bytes(job.out[:-row_bytes])


class OfOtherLayers(TransformersEngine):
    """Gives each layer's place to the next one asked for, the first one's to the last."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        for job in jobs:
            rows_RLD = torch.frombuffer(job.out, dtype=torch.float32).view(job.num_rows, 1 + len(job.layers), -1)
            rows_RLD[:, 1:] = rows_RLD[:, 1:].roll(1, dims=1)


class OfParts(TransformersEngine):
    """Leaves an eighth out of every layer's sum."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        super().prefill(jobs)
        for job in jobs:
            rows_RLD = torch.frombuffer(job.out, dtype=torch.float32).view(job.num_rows, 1 + len(job.layers), -1)
            rows_RLD[:, 1:] *= 7 / 8


class WithoutLayers(TransformersEngine):
    """Computes no request for some."""

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        if jobs[0].layers:
            raise EngineFailure("rows are missing")
        super().prefill(jobs)


def loaded(engine: TransformersEngine) -> tuple[TransformersEngine, EngineDescription]:
    return engine, engine.load()


def config(model: Path) -> EngineConfig:
    return EngineConfig(model=model, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_agree(tiny_models: TinyModels, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_models.path("qwen3", dtype=dtype)
    with caplog.at_level(logging.INFO):
        num_layers = check_reference(*loaded(TransformersEngine(config(path))), open_checkpoint(path))
    assert num_layers == 2
    assert "rows compared" in caplog.messages
    assert "outputs of layers compared" in caplog.messages


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OfOtherLayers, "SGLang and transformers disagree about layer 1"),
        (OfParts, r"disagree about layer 1: rows differ by 0\.1[23] relative \(at most 0\.1 is rounding\)"),
        (WithoutLayers, "rows are missing"),
    ],
)
def test_layers_that_are_others_are_not_given_and_final_rows_are(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture, kind: type[TransformersEngine], reason: str
) -> None:
    path = tiny_models.path("qwen3", num_hidden_layers=3)
    assert check_reference(*loaded(kind(config(path))), open_checkpoint(path)) == 0
    (record,) = (record for record in caplog.records if record.message == "outputs of layers are not given")
    assert re.search(reason, record.__dict__["reason"])


def test_layers_next_to_each_other_are_told_apart(tiny_models: TinyModels) -> None:
    path = tiny_models.path("qwen3", num_hidden_layers=3, initializer_range=0.001)  # each adds little
    engine, model = loaded(TransformersEngine(config(path)))
    assert check_reference(engine, model, open_checkpoint(path)) == 3
    assert check_reference(*loaded(OfOtherLayers(config(path))), open_checkpoint(path)) == 0


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
    assert check_reference(engine, model, open_checkpoint(path)) == 0  # layers: nothing says whether they are right
    assert "not compared with transformers" in caplog.messages
    assert "rows compared with nothing, but kept for the next start" in caplog.messages
    assert check_reference(engine, model, open_checkpoint(path)) == 0
    with pytest.raises(EngineFailure, match=rf"SGLang and an earlier start, whose rows {tmp_path}/.* keeps, disagree"):
        check_reference(*loaded(Shifted(config(path))), open_checkpoint(path))


def test_other_weights_of_an_updatable_model_are_compared_with_their_own_first_start(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdmesh_teacher.sglang.reference.transformers_model", lambda *_: None)
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
