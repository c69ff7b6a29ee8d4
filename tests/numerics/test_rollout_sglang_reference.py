"""The start-up comparison of samples accepts rounding and nothing else. Any engine serves to show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.errors import EngineFailure
from kdmesh.models.checkpoint import Checkpoint, open_checkpoint
from kdmesh.sglang import reference
from kdmesh.sglang.runtime import SglangRuntime
from kdmesh_rollout.config import TransformersEngine as EngineConfig
from kdmesh_rollout.sglang.reference import check_reference
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.tiny_models import TinyModels


class Prefiller:
    """Gives prompts' log-probabilities as SGLang does, by a model of transformers."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    async def async_generate(self, *, input_ids: list[list[int]], **_: Any) -> list[dict[str, Any]]:
        return [{"meta_info": {"input_token_logprobs": self._logprobs(ids)}} for ids in input_ids]

    def _logprobs(self, ids: list[int]) -> list[tuple[float | None, int, None]]:
        ids_T = torch.tensor(ids)
        with torch.no_grad():
            log_p_TV = self._model(ids_T[None]).logits[0].float().log_softmax(-1)
        own_T = log_p_TV[:-1].gather(1, ids_T[1:, None])[:, 0].tolist()
        return [(None, ids[0], None), *((value, token, None) for value, token in zip(own_T, ids[1:], strict=True))]


class Runtime:
    """What the comparison needs of SGLang."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.engine = Prefiller(path)

    def run(self, call: Any) -> Any:
        try:
            call.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("it waits for something")


def check(served: Path, expected: Path) -> None:
    engine = TransformersEngine(EngineConfig(model=served, device="cpu"))
    check_reference(engine, engine.load(), cast(SglangRuntime, Runtime(expected)))


@pytest.fixture(params=["transformers", "its own prefill"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def nothing_left(size_bytes: int) -> None:
        raise OSError("there is not enough memory")

    if request.param != "transformers":
        monkeypatch.setattr(reference, "require_available", nothing_left)
    return cast(str, request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_itself_is_accepted(
    source: str, dtype: torch.dtype, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tiny_models.path(dtype=dtype)
    check(path, path)
    [line] = [record for record in caplog.records if record.message == "log-probabilities compared"]
    assert vars(line)["with"] == source
    assert vars(line)["mean_difference_nats"] < 2e-2


def test_other_weights_are_refused(source: str, tiny_models: TinyModels) -> None:
    with pytest.raises(EngineFailure, match=f"SGLang and {source} disagree"):
        check(tiny_models.path(seed=1), tiny_models.path(seed=2))
