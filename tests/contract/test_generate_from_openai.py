"""`kdmesh generate --openai` writes a dataset of what a model behind an OpenAI API answers."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdmesh.auth.config import AccessConfig, ClientTlsConfig
from kdmesh.commands import cli
from kdmesh.errors import ConfigError
from kdmesh.images import encoded, noise_image
from kdmesh.openai import client
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, ImagesConfig
from tests.support.certificates import CertificateAuthority
from tests.support.openai_runs import answers, asked_again_soon, four_prompts, report, rows, run, words, write
from tests.support.openai_server import KEY, MODEL, Answer, OpenAIServer, answer_of, openai_server, said
from tests.support.teacher_process import started
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import check_answers_can_be_learnt

CALL = {"id": "call7", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "it"}'}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    with asked_again_soon(monkeypatch) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return four_prompts(tmp_path)


def test_every_prompt_is_asked_once_with_all_that_it_says_and_answered_in_order(
    server: OpenAIServer, prompts: Path
) -> None:
    how = ("--samples", "2", "--temperature", "0.5", "--top-p", "0.9", "--max-new-tokens", "7", "--stop", "###")
    fields = ("--template-setting", "enable_thinking=false", "--request-field", "top_k=20")
    result = run(server, prompts, *how, *fields, "--request-field", "top_p=null")
    zeros = dict.fromkeys(("cut_off", "blank", "filtered", "refused", "malformed", "rejected"), 0)
    assert report(result) == {"prompts": 4, "written": 8, **zeros, "prompt_tokens": 40, "completion_tokens": 24}
    asked = sorted(server.asked, key=lambda body: str(body["messages"]))
    seeds = [body.pop("seed") for body in asked]
    assert asked == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"say {number}"}],
            "n": 2,
            "temperature": 0.5,
            "max_tokens": 7,
            "stop": ["###"],
            "chat_template_kwargs": {"enable_thinking": False},
            "top_k": 20,
        }
        for number in range(4)
    ]
    assert len(set(seeds)) == 4
    assert answers(prompts) == [
        answer_of(body | {"seed": seed}, sample) for body, seed in zip(asked, seeds, strict=True) for sample in range(2)
    ]
    assert server.keys == {""}


@pytest.mark.parametrize("refuses", [False, True])
def test_of_a_server_that_knows_no_n_the_answers_are_asked_for_one_by_one(
    server: OpenAIServer, prompts: Path, refuses: bool
) -> None:
    assert run(server, prompts, "--samples", "3").exit_code == 0
    whole = rows(prompts)
    server.takes_n, server.asked = False, []
    if refuses:
        server.next.append(Answer(400, {"error": {"message": "n must be 1"}}))
    result = run(server, prompts, "--samples", "3", "--overwrite", "--concurrency", "1")
    assert report(result)["prompt_tokens"] == 120
    assert rows(prompts) == whole
    assert [body.get("n") for body in server.asked][:4] == [3, None, None, None] if refuses else [3, 2, None, 3]
    assert len(server.asked) == 13 if refuses else 12


def test_a_server_that_gives_more_than_was_asked_for_is_not_believed(server: OpenAIServer, prompts: Path) -> None:
    server.choices["say 1"] = [said("a"), said("b"), said("c")]
    assert report(run(server, prompts, "--samples", "2"))["written"] == 8
    assert answers(prompts)[2:4] == ["a", "b"]


def test_what_turns_and_answers_hold_is_passed_on(server: OpenAIServer, tmp_path: Path) -> None:
    image = noise_image(8, 6, seed=0)
    (tmp_path / "it.png").write_bytes(encoded(image))
    url = f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"
    tools = [{"name": "look_up", "parameters": {"type": "object"}}]
    before = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [{"name": "look_up", "arguments": {}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "call7"},
    ]
    seen = {"role": "user", "content": [{"type": "image", "image": "it.png"}, {"type": "text", "text": "what is it"}]}
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"messages": before, "system": "Be brief.", "tools": tools},
        {"conversations": [], "messages": [{"from": "human", "value": "hi"}]},
        {"messages": [seen]},
    )
    server.choices = {
        "4": [said(None, finish_reason="tool_calls", tool_calls=[{"index": 0, **CALL}], reasoning_content="so")],
        "hi": [said("ho", reasoning="because")],
    }
    assert report(run(server, prompts, "--concurrency", "1"))["written"] == 3
    first, second, third = server.asked
    assert first["tools"] == [{"type": "function", "function": tools[0]}]
    own = {"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [own]},
        {"role": "tool", "content": "3", "tool_call_id": "call00000"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "call7"},
    ]
    assert (second["messages"], "tools" in second) == ([{"role": "user", "content": "hi"}], False)
    assert third["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is it"},
    ]
    written = rows(prompts)
    assert [row["messages"][-1] for row in written[:2]] == [
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL]},
        {"role": "assistant", "content": "ho", "reasoning_content": "because"},
    ]
    assert written[0]["messages"][1:-1] == before
    assert written[0]["tools"] == tools
    chats = list(open_dataset(ChatFile(path=prompts.with_name("answers.jsonl")), images=ImagesConfig())())
    assert [chat.messages[-1].reasoning for chat in chats] == ["so", "because", ""]
    assert chats[0].messages[-1].tool_calls[0]["function"]["arguments"] == {"word": "it"}
    assert [found.digest for found in chats[2].messages[0].images] == [image.digest]


def test_an_image_on_the_web_is_refused_before_anything_is_asked(server: OpenAIServer, tmp_path: Path) -> None:
    seen = {"role": "user", "content": [{"type": "image", "image": "https://a.b/it.png"}]}
    result = run(server, write(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"messages": [seen]}))
    assert (result.exit_code, "is on the web, and nothing is fetched here" in result.output) == (2, True)
    assert server.asked == []


def test_without_a_key_that_is_said(server: OpenAIServer, prompts: Path) -> None:
    server.wants_key = True
    result = run(server, prompts)
    assert (result.exit_code, "there is no key: set OPENAI_API_KEY" in result.output) == (2, True), result.output


def test_the_key_comes_from_the_environment_or_a_file(
    server: OpenAIServer, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.wants_key = True
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    assert run(server, prompts).exit_code == 0
    monkeypatch.setenv(client.KEY_VARIABLE, "another")
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "access.yaml").write_text(f"token_file: {tmp_path / 'key'}\n")
    assert run(server, prompts, "--overwrite", "--access", str(tmp_path / "access.yaml")).exit_code == 0
    assert server.keys == {f"Bearer {KEY}"}
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir() if path.name != "key")


@pytest.mark.parametrize("name", ["teacher.ml", "other.ml"])
def test_a_server_is_known_by_its_certificate(prompts: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 2.0)
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    directory = prompts.parent
    authority = CertificateAuthority(directory)
    pair = authority.issue("server", ["teacher.ml"])
    (directory / "access.yaml").write_text(f"tls: {{ca: {authority.cert}, server_name: {name}}}\n")
    with openai_server(certificate=pair) as server:
        result = run(server, prompts, "--access", str(directory / "access.yaml"))
        assert (result.exit_code == 0) == (name == "teacher.ml"), result.output
        assert server.keys == ({f"Bearer {KEY}"} if name == "teacher.ml" else set())
    assert name == "teacher.ml" or "certificate verify failed" in result.output


def test_a_key_goes_in_the_clear_only_where_that_is_said() -> None:
    for url, access, is_fine in (
        ("http://host/v1", AccessConfig(), False),
        ("http://host/v1", AccessConfig(plaintext_token=True), True),
        ("http://host/v1", AccessConfig(tls=ClientTlsConfig()), False),
        ("https://host/v1", AccessConfig(tls=ClientTlsConfig()), True),
        ("http://[::1]:8000/v1", AccessConfig(), True),
    ):
        with nullcontext() if is_fine else pytest.raises(ConfigError, match=r"in the clear|must begin with https://"):
            client.Endpoint(urls=[url], model=MODEL, access=access, key=KEY)


def test_prompts_that_are_refused_may_be_left_out(server: OpenAIServer, prompts: Path) -> None:
    server.refused = {"say 1": Answer(400, {"message": "too long"})}
    stopped = run(server, prompts, "--concurrency", "1", "--samples", "2")
    assert (stopped.exit_code, "left out with --skip-rejected" in stopped.output) == (2, True)
    asked = server.times_asked()
    result = run(server, prompts, "--concurrency", "1", "--samples", "2", "--skip-rejected")
    assert "Going on behind 1 prompts" in result.output
    told = report(result)
    assert (told["prompts"], told["written"], told["rejected"]) == (4, 6, 1)
    assert "1 prompts were rejected" in result.stdout
    assert server.times_asked() - asked == {"say 1": 2, "say 2": 1, "say 3": 1}


def test_what_is_no_answer_is_left_out_and_counted(server: OpenAIServer, prompts: Path) -> None:
    server.choices = {
        "say 0": [said("half a", finish_reason="length"), said("")],
        "say 1": [said("", reasoning_content="thought"), said("bad", finish_reason="content_filter")],
        "say 2": [said(None, refusal="I will not"), said("half a pair \ud83d")],
        "say 3": [said(None, tool_calls=[{"type": "function", "function": {}}]), said("so")],
    }
    how = ("--samples", "2", "--overwrite")
    result = run(server, prompts, *how)
    told = report(result)
    counts = {"cut_off": 1, "blank": 2, "filtered": 1, "refused": 1, "malformed": 2, "rejected": 0}
    assert {name: told[name] for name in counts} == counts
    assert result.stdout.startswith(
        "1 answer to 4 prompts; 1 reached the length limit, 2 were blank, 1 were stopped by a content filter, 1 were "
        "refusals, 2 were malformed and left out. "
    )
    assert answers(prompts) == ["so"]
    assert report(run(server, prompts, *how, "--keep-cut-off"))["written"] == 2
    assert answers(prompts) == ["half a", "so"]
    server.refused = {f"say {i}": Answer(400, {"error": {"message": "no", "code": "content_filter"}}) for i in range(4)}
    result = run(server, prompts, *how)
    assert (result.exit_code, "no answer is left: 8 were stopped by a content filter" in result.output) == (2, True)


def test_as_many_requests_as_may_be_are_under_way(server: OpenAIServer, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": f"say {number}"} for number in range(10)))
    server.together = threading.Barrier(5)
    assert run(server, prompts, "--concurrency", "5").exit_code == 0
    assert server.most == 5


def test_a_student_learns_from_the_answers(server: OpenAIServer, tiny_models: TinyModels, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": f"say {number}"} for number in range(16)))
    server.choices = {f"say {i}": [said("that is so")] for i in range(16)}
    assert report(run(server, prompts))["written"] == 16
    answered, student = prompts.with_name("answers.jsonl"), tiny_models.path("qwen3", seed=6, hidden_size=24)
    check_answers_can_be_learnt(answered, tmp_path, student=student, steps=12)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--openai", "127.0.0.1:8000"),
            "--openai '127.0.0.1:8000' is not of the form http://HOST:PORT/v1 or https://",
        ),
        (("--openai", "http://a:b/v1"), "is not of the form"),
        (
            ("--openai", "https://me:secret@host/v1"),
            "a key belongs in OPENAI_API_KEY, or in the token_file",
        ),
        (("--openai", "https://host/v1/chat/completions"), "give what comes before /chat/completions"),
        (("--openai", "http://host/v1"), "the key of OPENAI_API_KEY would travel in the clear to another machine"),
        (("--model", "models/it"), "--model does not go with --openai"),
        (("--teacher", "127.0.0.1:1"), "generate needs servers of one kind"),
        (("--request-field", "messages=[]"), "'messages' is no field that can be set"),
        (("--request-field", "seed=5"), "seed=5 would make all samples of a prompt the same"),
        (("--request-field", "day=2024-01-01"), "is not of the form NAME=VALUE, with a value that JSON has"),
        (("--request-field", "top_k"), "is not of the form NAME=VALUE"),
    ],
)
def test_what_cannot_be_asked_so_is_refused_at_once(
    server: OpenAIServer, prompts: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], told: str
) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    result = run(server, prompts, *options)
    assert (result.exit_code, told in result.output) == (2, True), result.output
    assert "secret" not in result.output
    assert server.asked == []


def test_options_of_the_other_kinds_are_refused(prompts: Path) -> None:
    where = ("--prompts", str(prompts), "--output", str(prompts.with_name("answers.jsonl")))
    for options, told in (
        (("--openai", "https://host/v1"), "--openai needs --model-name"),
        (("--rollout", "127.0.0.1:1"), "--rollout needs --model"),
        (("--rollout", "127.0.0.1:1", "--model", "m", "--concurrency", "16"), "--concurrency goes only with --openai"),
        (("--teacher", "127.0.0.1:1", "--model", "m", "--skip-rejected"), "--skip-rejected goes only with --openai"),
    ):
        result = CliRunner().invoke(cli.main, ["generate", *options, *where])
        assert (result.exit_code, told in result.output) == (2, True), result.output


def test_a_file_whose_tools_hold_no_number_is_refused(server: OpenAIServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "tools": [{"name": "f", "most": NaN}]}\n')
    result = run(server, prompts)
    assert (result.exit_code, "line 1: its tools hold a number that no JSON has" in result.output) == (2, True)


def test_what_it_needs_is_named_where_it_is_missing(server: OpenAIServer, prompts: Path) -> None:
    code = "import sys; sys.modules['httpx'] = None; from kdmesh.commands.cli import main; main()"
    with started(prompts.parent, "-c", code, *words(server, prompts)) as process:
        assert process.wait(60) == 2
        assert process.stderr is not None
        assert "--openai needs httpx: pip install 'kdmesh[openai]'" in process.stderr.read()
    assert not prompts.with_name("answers.jsonl.part").exists()
