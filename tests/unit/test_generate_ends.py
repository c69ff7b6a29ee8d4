"""Prompts of `kdmesh generate`, and the ends of its answers, are those of a trainer's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdmesh.answering.chat_tokens import ChatTokens
from kdmesh.answering.prompt_rows import Asked
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.models.ends import stop_token_ids
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.turns import Unusable
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_ends_with_its_turn_and_with_the_text(family: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(family)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    found = ChatTokens(tmp_path).ends
    assert {5, 7, tokenizer.eos_token_id} <= set(found)
    # Of a template that a trainer cannot cut into turns the end can be told all the same.
    assert set(found) >= set(stop_token_ids(tmp_path, tokenizer, ChatEncoder(tokenizer))) or family == "forgetful"


def test_a_turn_may_end_with_another_token_than_the_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("gemma")
    tokenizer.save_pretrained(tmp_path)
    ends = ChatTokens(tmp_path).ends
    assert tokenizer.convert_ids_to_tokens(list(ends)) == ["<|eos|>", "<|end_of_turn|>"]


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d"])
def test_a_prompt_is_dated_as_a_trainers_is(form: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "  {{ strftime_now('" + form + "') }}" + TEMPLATES["chatml"]
    tokenizer.save_pretrained(tmp_path)
    turn = Message(role="user", content="why")
    shown = [{"role": "user", "content": "why"}]
    ids, _ = ChatTokens(tmp_path).prompt(Asked(number=0, origin="line 1", messages=shown, turns=(turn,)))
    [prompt] = ChatEncoder(tokenizer).encode_prompts([Chat(messages=(turn,), origin="line 1")])
    assert not isinstance(prompt, Unusable)
    assert ids.tolist() == prompt.token_ids.tolist()
