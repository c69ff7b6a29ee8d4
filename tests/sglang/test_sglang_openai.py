"""`kdmesh generate --openai` against SGLang's own OpenAI server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, ImagesConfig
from tests.support.free_port import free_port
from tests.support.sglang_teachers import sglang_environment
from tests.support.teacher_process import started
from tests.support.tiny_models import TinyModels

pytestmark = pytest.mark.sglang

KEY = "sk-test"
_CPU = ("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--sleep-on-idle")
_SMALL = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "16")
_QUICK = ("--disable-cuda-graph", "--skip-server-warmup", "--log-level", "error")


@pytest.fixture(scope="module")
def url(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    model = ("--model-path", str(tiny_models.path(seed=5)), "--served-model-name", "tiny", "--api-key", KEY)
    where = ("--port", str(port), "--reasoning-parser", "qwen3")
    command = ("-m", "sglang.launch_server", *model, *where, *_CPU, *_SMALL, *_QUICK)
    with started(tmp_path_factory.mktemp("s"), *command, environment=sglang_environment()) as process:
        while True:
            assert process.poll() is None
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        process.wait(30)


def run(url: str, directory: Path, *options: str) -> Result:
    prompts = directory / "prompts.jsonl"
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "say it"}]
    prompts.write_text("".join(json.dumps({"messages": turns, "n": number}) + "\n" for number in range(6)))
    where = ("--model-name", "tiny", "--prompts", str(prompts), "--output", str(directory / "answers.jsonl"))
    how = ("--samples", "2", "--keep-cut-off")
    return CliRunner().invoke(cli.main, ["generate", "--openai", url, *where, *how, *options])


def test_its_answers_are_a_dataset(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    plain = ("--template-setting", "enable_thinking=false", "--max-new-tokens", "12")
    result = run(url, tmp_path, *plain)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert (told["prompts"], told["written"] + told["blank"]) == (6, 12)
    assert told["prompt_tokens"] > 0 < told["completion_tokens"] <= 12 * 12
    chats = list(open_dataset(ChatFile(path=tmp_path / "answers.jsonl"), images=ImagesConfig())())
    assert len(chats) == told["written"]
    assert len({chat.messages[-1].content for chat in chats}) > 6


def test_thoughts_that_never_end_are_no_answers(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    result = run(url, tmp_path, "--max-new-tokens", "4")
    assert "no answer is left: 12 were blank" in result.output


@pytest.mark.parametrize(
    ("key", "options", "told"),
    [
        ("", (), "answers 401: Unauthorized; there is no key"),
        (KEY, ("--max-new-tokens", "5000"), "answers 400: Requested token count exceeds the model's maximum context"),
    ],
)
def test_what_it_refuses_is_told(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, options: tuple[str, ...], told: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    result = run(url, tmp_path, *options)
    assert (result.exit_code, told in result.output) == (2, True), result.output
