"""Which environments a trainer's configuration takes, and which templates go with several turns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdmesh import config
from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.environment_config import EnvironmentConfig
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sources.environment import resolve_environment
from tests.support.chat_tokenizers import chat_tokenizer

GOOD = """
output: runs/x
steps: 100
student: {model: models/student}
teacher: {addresses: ["127.0.0.1:50051"]}
data: {train: {format: chat, path: train.jsonl}}
source: {kind: on_policy, environment: {respond: "my_module:respond"}}
"""
HERE = "tests.unit.test_environment_config"


def load(tmp_path: Path, *overrides: str) -> TrainerConfig:
    path = tmp_path / "train.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return config.load(TrainerConfig, path, overrides)


def respond(messages: object, row: object, *, unit: str) -> None:
    """Ends the episode."""


def with_turn(messages: object, row: object, turn: int) -> None:
    """Wants what nobody gives it."""


def alone(messages: object) -> None:
    """Wants less than it is given."""


def resolved(family: str, function: str = "respond", **keys: object) -> None:
    params = {} if "params" in keys else {"params": {"unit": "m"}}
    cfg = EnvironmentConfig.model_validate({"respond": f"{HERE}:{function}", **params, **keys})
    resolve_environment(cfg, chat_tokenizer(family))


def test_an_environment_needs_its_function_alone(tmp_path: Path) -> None:
    source = load(tmp_path).source
    assert isinstance(source, OnPolicy)
    environment = source.environment
    assert environment is not None
    assert (environment.max_turns, environment.history, environment.params) == (8, "templated", {})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.teacher_tokenizer={path: models/teacher}", "source.environment does not go with data.teacher_tokenizer"),
        (
            "data.teacher_context={kind: system_prompt, text: x}",
            "source.environment does not go with data.teacher_context",
        ),
        ("data.token_cache={directory: cache}", "data.token_cache does not go with source.environment, which needs"),
        ("data.train={format: text, path: a.jsonl}", "source.environment needs chats: data.train has format text"),
        (
            "data.train={format: blend, datasets: {book: {format: text, path: a.jsonl, weight: 1}}}",
            "source.environment needs chats: data.train.datasets.book has format text",
        ),
        ("source.environment.respond=respond", "source.environment.respond: "),
        ("source.environment.max_turns=0", "source.environment.max_turns: Input should be greater than or equal to 1"),
        ("source.environment.deadline_s=0", "source.environment.deadline_s: Input should be greater than 0"),
        ("source.environment.max_calls=0", "source.environment.max_calls: Input should be greater than or equal to 1"),
        ("source.environment.history=kept", "source.environment.history: Input should be 'templated' or 'drawn'"),
        ("source.environment.turns=3", "source.environment.turns: there is no such key"),
        ("source.environment={max_turns: 3}", "source.environment.respond: is required"),
        ("source.kind=off_policy", "source.environment: there is no such key for off_policy"),
    ],
)
def test_what_episodes_cannot_be_drawn_with_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("function", "params", "words"),
    [
        ("respond", {}, "missing params: unit"),
        ("respond", {"unit": "m", "colour": "red"}, "unknown params: colour"),
        ("absent", {}, "has no function 'absent'"),
        ("with_turn", {}, "missing params: turn"),
        ("alone", {}, "must take 2 positional arguments, it takes 1"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused(function: str, params: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"source\.environment: .*{words}") as refused:
        resolved("chatml", function, params=params)
    assert HERE in str(refused.value)


@pytest.mark.parametrize("family", ["harmony", "forgetful", "r1", "counting", "channels"])
def test_a_template_that_always_changes_earlier_turns_is_refused_unless_what_was_drawn_is_kept(family: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.environment\.history is templated.*`history: drawn` goes on"):
        resolved(family)
    if family != "forgetful":
        resolved(family, history="drawn")


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "phi", "qwen3", "plain", "plain_space"])
def test_other_templates_are_taken(family: str) -> None:
    resolved(family)
