"""`kdmesh generate --openai` ends with every answer once, whatever happens on the way."""

from __future__ import annotations

import email.utils
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kdmesh.answering.kept_answers import KeptAnswers
from kdmesh.openai import client
from tests.support.openai_runs import answers, asked_again_soon, four_prompts, report, rows, run, words, write
from tests.support.openai_server import KEY, Answer, OpenAIServer, said
from tests.support.teacher_process import started

FAULTS: dict[str, Any] = {
    "busy": Answer(429, {"error": {"message": "slow down"}}),
    "failure": Answer(500, {"error": {"message": "oops"}}),
    "reset": "reset",
    "no JSON": "garbage",
    "hang": "hang",
    "error in a reply": Answer(body={"error": {"message": "upstream", "code": 502}}),
    "no choice": Answer(body={"choices": []}),
    "given up": Answer(body={"choices": [said("half", finish_reason="abort")]}),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    with asked_again_soon(monkeypatch) as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return four_prompts(tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_what_may_pass_a_server_is_asked_again(server: OpenAIServer, prompts: Path, fault: str) -> None:
    assert run(server, prompts).exit_code == 0
    whole, server.asked = rows(prompts), []
    server.next.extend([FAULTS[fault]] * 2)
    result = run(server, prompts, "--overwrite", *(("--timeout", "1") if fault == "hang" else ()))
    assert report(result)["completion_tokens"] == 12
    assert rows(prompts) == whole
    assert len(server.asked) == 6
    assert sum(server.times_asked().values()) == 6


def test_a_server_is_given_the_time_that_it_asks_for(
    server: OpenAIServer, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.next.append(Answer(503, {"detail": "loading"}, {"Retry-After": "1"}))
    assert run(server, prompts, "--concurrency", "1").exit_code == 0
    [told] = [record.__dict__ for record in caplog.records if record.getMessage() == "asking a server again"]
    assert (told["url"], told["reason"]) == (server.url, "answers 503: loading")
    assert 1 <= told["wait_s"] <= 1.3
    assert len(server.asked) == 5


def test_a_time_that_is_asked_for_may_be_a_date() -> None:
    late = email.utils.formatdate(time.time() + 100, usegmt=True)
    early = email.utils.formatdate(time.time() - 100, usegmt=True)
    for asked, least, most in ((late, 90, 100), (early, 0, 0), ("7.5", 7.5, 7.5), ("-3", 0, 0), ("soon", 0, 0)):
        assert least <= client._retry_after_s(httpx.Headers({"Retry-After": asked})) <= most, asked


def test_what_does_not_pass_ends_with_the_servers_words(
    server: OpenAIServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_RETRY_S", 0.1)
    server.next.extend([Answer(500, {"message": "no memory"})] * 100)
    result = run(server, prompts, "--concurrency", "1")
    assert result.exit_code == 3
    assert f"{server.url}: answers 500: no memory; it was tried again for 0 s" in result.output
    monkeypatch.setattr(client, "_CONNECT_S", 2.0)
    monkeypatch.setattr(server, "url", "http://127.0.0.1:1/v1")
    result = run(server, prompts)
    assert result.exit_code == 3
    assert "http://127.0.0.1:1/v1: All connection attempts failed; it was tried again" in result.output
    assert list(prompts.parent.iterdir()) == [prompts]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            Answer(401, {"error": {"message": f"Incorrect key: {KEY}."}}),
            "answers 401: Incorrect key: ***; the key is that of OPENAI_API_KEY: set OPENAI_API_KEY, or token_file",
        ),
        (Answer(403, {"error": {"message": "not yours"}}), "answers 403: not yours"),
        (Answer(404, {"detail": "Not Found"}), "answers 404: Not Found; --openai is what comes before /chat/completi"),
        (
            Answer(400, {"object": "error", "message": "This model's maximum context length is 8."}),
            "line 1: {url} answers 400: This model's maximum context length is 8. The prompts that a server refuses",
        ),
        (
            Answer(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
            "answers 429: You exceeded your quota",
        ),
        (Answer(308, "moved", {"Location": "https://b/v1"}), "answers 308: moved; it leads to https://b/v1, which"),
    ],
)
def test_what_no_waiting_mends_ends_at_once(
    server: OpenAIServer, prompts: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, told: str
) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    server.refused = {"say 0": answer}
    result = run(server, prompts, "--concurrency", "1")
    assert result.exit_code == 2
    assert told.format(url=server.url) in result.output
    assert KEY not in result.output
    assert len(server.asked) == 1
    assert list(prompts.parent.iterdir()) == [prompts]


def test_ctrl_c_keeps_what_came_and_the_same_command_asks_for_the_rest(
    server: OpenAIServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(server, prompts, "--samples", "2").exit_code == 0
    whole, server.asked = rows(prompts), []
    add = KeptAnswers.add

    def interrupted(kept: KeptAnswers, *arguments: Any) -> None:
        add(kept, *arguments)
        if kept.prompts == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "add", interrupted)
        result = run(server, prompts, "--samples", "2", "--overwrite", "--concurrency", "1")
    assert result.exit_code == 130
    assert "The answers to 2 prompts are kept in" in result.output
    for other in (("--seed", "1"), ("--temperature", "0"), ("--request-field", "top_k=2"), ("--samples", "3")):
        result = run(server, prompts, "--samples", "2", *other, "--overwrite")
        assert (result.exit_code, "holds answers to something else" in result.output) == (2, True), other
    asked, server.asked = server.times_asked(), []
    assert report(run(server, prompts, "--samples", "2", "--overwrite"))["completion_tokens"] == 24
    assert rows(prompts) == whole
    # The third was under way.
    assert (asked.keys() & {"say 0", "say 1", "say 3"}, server.times_asked()) == (
        {"say 0", "say 1"},
        {"say 2": 1, "say 3": 1},
    )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_is_killed_goes_on_with_what_had_not_come(
    server: OpenAIServer, tmp_path: Path, signum: signal.Signals
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": f"say {number}"} for number in range(9)))
    server.next.append("hang")
    arguments = words(server, prompts, "--concurrency", "3")
    with started(tmp_path, "-c", "from kdmesh.commands.cli import main; main()", *arguments) as process:
        part = prompts.with_name("answers.jsonl.part")
        wait_for(lambda: part.exists() and len(part.read_bytes().splitlines()) == 9)  # the first waits
        process.send_signal(signum)
        assert process.wait(20) == (-signal.SIGKILL if signum is signal.SIGKILL else 128 + signum)
    assert not prompts.with_name("answers.jsonl").exists()
    [hung] = {f"say {number}" for number in range(9)} - set(kept_texts(part))
    assert set(server.times_asked().values()) == {1}
    server.asked = []
    assert report(run(server, prompts))["completion_tokens"] == 27
    assert server.times_asked() == {hung: 1}
    assert [text.partition("?")[0] for text in answers(prompts)] == [f"say {number}" for number in range(9)]


def kept_texts(part: Path) -> list[str]:
    entries = [json.loads(line) for line in part.read_text().splitlines()[1:]]
    return [row["messages"][0]["content"] for entry in entries for row in entry["rows"]]


def wait_for(fact: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_proxy_of_the_environment_never_leads_to_this_machine(
    server: OpenAIServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(client, "_CONNECT_S", 2.0)
    assert report(run(server, prompts))["written"] == 4


def test_another_server_of_the_model_is_asked_where_one_fails(server: OpenAIServer, prompts: Path) -> None:
    result = run(server, prompts, "--openai", "http://127.0.0.1:1/v1")
    assert report(result)["written"] == 4
    assert set(server.times_asked().values()) == {1}
