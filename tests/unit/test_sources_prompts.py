"""Prompts are what inference would feed the model; their order and seeds follow from seed and step alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import DataError
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.encoding.turns import Reason, Unusable
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.prompts import PromptPolicy, PromptSet, digest_prompts, load_prompts
from kdmesh_trainer.sections.data_config import ChatFile
from kdmesh_trainer.sources.order import PromptOrder
from tests.support.chat_tokenizers import chat_tokenizer

FAMILIES = ("chatml", "llama3", "gemma", "mistral", "phi", "qwen3")
SEVERAL = [("user", "Was it so?"), ("assistant", "It was."), ("user", "why?"), ("assistant", "Nobody knows:\n\n1. one")]
TOKENIZER = chat_tokenizer("chatml")


def chat(turns: list[tuple[str, str]]) -> Chat:
    return Chat(messages=tuple(Message(role=role, content=text) for role, text in turns), origin="here")


def inference_ids(family: str, turns: list[tuple[str, str]]) -> list[int]:
    """What inference would feed the model, by the library's own way."""
    ids: list[int] = chat_tokenizer(family).apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("turns", "prompt"), [(SEVERAL, SEVERAL[:3]), (SEVERAL[:3], SEVERAL[:3]), (SEVERAL[:2], SEVERAL[:1])]
)
def test_a_prompt_is_what_inference_would_feed_the_model(
    family: str, turns: list[tuple[str, str]], prompt: list[tuple[str, str]]
) -> None:
    [found] = ChatEncoder(chat_tokenizer(family)).encode_prompts([chat(turns)])
    assert not isinstance(found, Unusable)
    assert found.token_ids.dtype == np.int32
    assert found.token_ids.tolist() == inference_ids(family, prompt)


@pytest.mark.parametrize("family", ("chatml", "llama3", "gemma", "mistral", "phi"))
def test_a_prompt_is_what_comes_before_the_loss_tokens_of_the_same_chat(family: str) -> None:
    encoder = ChatEncoder(chat_tokenizer(family))
    [[sequence]] = encoder.encode([chat(SEVERAL[:2])])
    [prompt] = encoder.encode_prompts([chat(SEVERAL[:2])])
    assert sequence.token_ids[: sequence.positions[0] + 1].tolist() == prompt.token_ids.tolist()


_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|bos|>",
    "\n\n",
    " ",
    "é🎉",
    "<think>\n</think>",
)
_CONTENT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(_SPECIAL)), min_size=1, max_size=6).map("".join)


@settings(max_examples=60)
@given(family=st.sampled_from(FAMILIES), contents=st.lists(_CONTENT, min_size=1, max_size=5))
def test_any_chat_is_prompted_as_inference_would(family: str, contents: list[str]) -> None:
    turns = [("user" if number % 2 == 0 else "assistant", content) for number, content in enumerate(contents)]
    [found] = ChatEncoder(chat_tokenizer(family)).encode_prompts([chat(turns)])
    assert not isinstance(found, Unusable)
    assert found.token_ids.tolist() == inference_ids(family, turns if len(turns) % 2 else turns[:-1])


def test_rows_that_give_no_prompt_say_why_and_leave_the_others_in_place() -> None:
    chats = [chat([("assistant", "a")]), chat(SEVERAL), chat([("system", "a"), ("user", "b")])]
    only_answer, good, has_system = ChatEncoder(chat_tokenizer("gemma")).encode_prompts(chats)
    assert isinstance(only_answer, Unusable)
    assert only_answer.reason is Reason.NO_PROMPT
    assert not isinstance(good, Unusable)
    assert isinstance(has_system, Unusable)
    assert has_system.reason is Reason.TEMPLATE


@pytest.mark.parametrize(
    ("family", "token"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot|>"), ("gemma", "<|end_of_turn|>"), ("harmony", "<|return|>")],
)
def test_the_end_of_a_turn_is_what_the_model_says_to_end_it(family: str, token: str) -> None:
    tokenizer = chat_tokenizer(family)
    assert ChatEncoder(tokenizer).end_of_turn() == tokenizer.convert_tokens_to_ids(token)


def test_a_template_without_an_end_has_none(caplog: pytest.LogCaptureFixture) -> None:
    assert ChatEncoder(chat_tokenizer("plain")).end_of_turn() is None


def row(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load(path: Path, rows: list[dict[str, Any]], **policy: Any) -> PromptSet:
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    whole = PromptPolicy(**{"max_tokens": 40, "too_long": "drop", "unusable": "drop", **policy})
    return load_prompts("train", open_dataset(ChatFile(path=file)), ChatEncoder(TOKENIZER), whole)


LONG = row("Was it so? " * 30)
ONLY_ANSWER = {"messages": [{"role": "assistant", "content": "a"}]}


def test_everything_is_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = load(tmp_path, [row("a"), LONG, ONLY_ANSWER, row("b"), LONG])
    assert (found.report.rows, found.report.prompts, found.report.dropped_too_long) == (5, 2, 2)
    assert found.report.unusable == {"begins with an assistant turn": 1}
    assert found.report.tokens == sum(len(prompt.token_ids) for prompt in found.prompts)
    [record] = caplog.records
    assert (record.getMessage(), record.dataset) == ("prompts read", "train")  # type: ignore[attr-defined]


def test_the_answer_of_a_row_does_not_make_its_prompt_too_long(tmp_path: Path) -> None:
    assert load(tmp_path, [row("a", "It was so. " * 50)], too_long="fail").report.prompts == 1


def test_a_prompt_of_just_the_limit_is_taken(tmp_path: Path) -> None:
    [prompt] = load(tmp_path, [row("a")]).prompts
    length = len(prompt.token_ids)
    assert load(tmp_path, [row("a")], max_tokens=length, too_long="fail").report.prompts == 1
    with pytest.raises(DataError, match=rf"a\.jsonl:1: a prompt of {length} tokens, and {length - 1} leave"):
        load(tmp_path, [row("a")], max_tokens=length - 1, too_long="fail")


def test_unusable_rows_fail_where_the_policy_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: begins with an assistant turn .*data\.unusable: drop"):
        load(tmp_path, [row("a"), ONLY_ANSWER], unusable="fail")


def test_nothing_left_is_an_error_that_counts(tmp_path: Path) -> None:
    too_long = r"2 x too long for source\.sampling\.max_new_tokens to be within data\.max_tokens too"
    with pytest.raises(DataError, match=f"none of 3 rows gives a prompt: 1 x begins with .* turn, {too_long}"):
        load(tmp_path, [LONG, ONLY_ANSWER, LONG])


PROMPTS = [Prompt(token_ids=np.array([number, number + 1], np.int32)) for number in range(7)]


def test_order_and_seeds_are_a_pure_function_of_seed_and_step() -> None:
    whole = PromptOrder(PROMPTS, per_step=3, seed=4)
    again = PromptOrder(PROMPTS, per_step=3, seed=4)
    steps = [whole.of_step(step) for step in range(6)]
    for step in (5, 2, 0):
        assert [p.seed for p in again.of_step(step)] == [p.seed for p in steps[step]]
        assert digest_prompts(again.of_step(step)) == digest_prompts(steps[step])
    first_epoch = [int(p.token_ids[0]) for step in steps for p in step][:7]
    assert sorted(first_epoch) == list(range(7))


def test_every_place_of_every_step_draws_from_a_seed_of_its_own() -> None:
    orders = [PromptOrder(PROMPTS, per_step=4, seed=seed) for seed in range(3)]
    seeds = {p.seed for order in orders for step in range(20) for p in order.of_step(step)}
    assert len(seeds) == 3 * 20 * 4
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_the_digest_of_prompts_tells_where_one_ends() -> None:
    one, two, three, four = (np.array(ids, np.int32) for ids in ([1, 2], [3], [1], [2, 3]))
    sets = [
        [Prompt(token_ids=one), Prompt(token_ids=two)],
        [Prompt(token_ids=three), Prompt(token_ids=four)],
        [Prompt(token_ids=one, teacher_ids=two)],
        [Prompt(token_ids=one, teacher_ids=four)],
    ]
    assert len({digest_prompts(prompts) for prompts in sets}) == 4
    assert digest_prompts(sets[0]) == digest_prompts([Prompt(token_ids=one.copy()), Prompt(token_ids=two.copy())])
