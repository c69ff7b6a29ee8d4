"""Runs of `kdmesh generate` against a server with OpenAI's chat completions, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh.openai import client
from kdmesh.rpc.retry import RetryPolicy
from tests.support.openai_server import MODEL, OpenAIServer, openai_server


@contextmanager
def asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """A server that no key of the environment goes to, and that clients ask again without a long wait."""
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(client, "_RETRIES", RetryPolicy(first_s=0.01, longest_s=0.02))
    with openai_server() as running:
        yield running


def four_prompts(directory: Path) -> Path:
    return write(directory / "prompts.jsonl", *({"prompt": f"say {number}"} for number in range(4)))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(server: OpenAIServer, prompts: Path, *options: str) -> list[str]:
    output = prompts.with_name("answers.jsonl")
    where = ("--openai", server.url, "--model-name", MODEL, "--prompts", str(prompts), "--output", str(output))
    return ["generate", *where, *options]


def run(server: OpenAIServer, prompts: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.main, words(server, prompts, *options))


def rows(prompts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prompts.with_name("answers.jsonl").read_text().splitlines()]


def answers(prompts: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows(prompts)]


def report(result: Result) -> dict[str, int]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])
