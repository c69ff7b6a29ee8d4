"""Loss lies on what the assistant says and on the token that ends it, and on nothing else."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kdmesh.chats.chat_rows import Chat, Message, chat_from_row
from kdmesh.errors import ConfigError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder, read_template
from kdmesh_trainer.data.encoding.turns import Reason, Unusable
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer

FORMS = ("byte_level", "metaspace")
HARD_FORMS = (*FORMS, "gpt2")

# Family -> how an assistant turn reads, as a format string for its content.
TURN = {
    "chatml": "{}<|im_end|>",
    "llama3": "{}<|eot|>",
    "gemma": "{}<|end_of_turn|>",
    "mistral": " {}<|eos|>",
    "phi": "{}<|end|>",
}

CHATS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello there, how are you?")],
    "several turns": [
        ("user", "Was it so?"),
        ("assistant", "It was."),
        ("user", "why?"),
        ("assistant", "Nobody knows why:\n\n1. one\n2. two"),
        ("user", "yes"),
        ("assistant", "no"),
    ],
    "scripts": [
        ("user", "日本語で"),
        ("assistant", "はい、そうです。🎉👩‍👩‍👧 Ünïcödé"),
        ("user", "🎉"),
        ("assistant", "🎉"),
    ],
    "odd inside": [
        ("user", "a"),
        ("assistant", "x  y\tz\n\n\nw"),
        ("user", "b"),
        ("assistant", "<think>\n1\n</think>\n2"),
    ],
    "words of a template": [("user", "assistant"), ("assistant", "user"), ("user", "user"), ("assistant", "assistant")],
    "left open": [("user", "a"), ("assistant", "b"), ("user", "c")],
}


def chat(turns: list[tuple[str, str]]) -> Chat:
    return Chat(messages=tuple(Message(role=role, content=text) for role, text in turns), origin="here")


@cache
def tools(family: str, form: str = "byte_level") -> tuple[PreTrainedTokenizerFast, ChatEncoder]:
    tokenizer = chat_tokenizer(family, form=form)
    return tokenizer, ChatEncoder(tokenizer)


def encode(family: str, turns: list[tuple[str, str]], form: str = "byte_level") -> list[TokenSequence] | Unusable:
    [result] = tools(family, form)[1].encode([chat(turns)])
    return result


def sequences(family: str, turns: list[tuple[str, str]], form: str = "byte_level") -> list[TokenSequence]:
    result = encode(family, turns, form)
    assert isinstance(result, list), result
    return result


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...], *, is_prompt: bool) -> list[int]:
    """What inference would feed the model, by the library's own way."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=is_prompt,
        tokenize=True,
        return_dict=False,
    )
    return ids


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turns", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("family", TURN)
def test_loss_tokens_are_exactly_the_assistant_turns(family: str, turns: list[tuple[str, str]], form: str) -> None:
    for system in ([], [("system", "Be brief.")]):
        if system and family == "gemma":
            continue
        tokenizer, _ = tools(family, form)
        [sequence] = sequences(family, system + turns, form)
        said = "".join(TURN[family].format(text) for role, text in turns if role == "assistant")
        assert tokenizer.decode(sequence.labels) == said


def test_without_an_end_token_the_loss_ends_with_the_text() -> None:
    tokenizer, _ = tools("plain")
    [sequence] = sequences("plain", [("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "so be it ")])
    assert tokenizer.decode(sequence.labels) == " yes so be it "
    # A token that begins in the turn belongs to it: here the full stop with the template's newline.
    [sequence] = sequences("plain", [("user", "a"), ("assistant", "yes."), ("user", "b"), ("assistant", "no")])
    assert tokenizer.decode(sequence.labels) == " yes.\n no"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TURN)
def test_tokens_are_those_of_the_template_with_one_bos(family: str, form: str) -> None:
    tokenizer, _ = tools(family, form)
    turns = chat(CHATS["several turns"])
    [sequence] = sequences(family, CHATS["several turns"], form)
    ids = prompt_ids(tokenizer, turns.messages, is_prompt=False)
    assert sequence.token_ids.tolist() == ids[: sequence.num_tokens]
    assert tokenizer.decode(ids[sequence.num_tokens :]).strip() in ("", "<|eos|>")
    assert ids.count(tokenizer.bos_token_id) == (1 if TEMPLATES[family].startswith("<|bos|>") else 0)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it would have been doubled


def test_thinking_that_later_turns_strip_makes_one_sequence_per_turn() -> None:
    tokenizer, _ = tools("qwen3")
    first = "<think>\nhm\n</think>\n\nyes"
    parts = sequences("qwen3", [("user", "a"), ("assistant", first), ("user", "b"), ("assistant", "no")])
    assert [tokenizer.decode(part.labels) for part in parts] == [
        f"{first}<|im_end|>",
        "<think>\n\n</think>\n\nno<|im_end|>",
    ]
    history = tokenizer.decode(parts[1].token_ids[: parts[1].positions[0] + 1])
    turns = [("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "")]
    assert f"{history}<|im_end|>\n" == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def test_another_end_for_the_last_turn_makes_one_sequence_per_turn() -> None:
    tokenizer, _ = tools("harmony")
    parts = sequences("harmony", CHATS["several turns"])
    said = [text for role, text in CHATS["several turns"] if role == "assistant"]
    assert [tokenizer.decode(part.labels) for part in parts] == [f"{text}<|return|>" for text in said]


@pytest.mark.parametrize(
    ("thinking", "answer"),
    [
        ("hm", "yes"),
        ("The answer is yes, or yes.", "yes"),
        ("", "yes"),
        ("final", "final"),
        ("a", "a"),
        ("x", "return"),
    ],
)
def test_a_turn_in_channels_is_learnt_from_its_thinking_to_the_end_of_its_answer(thinking: str, answer: str) -> None:
    tokenizer, encoder = tools("channels")
    said = Message(role="assistant", content=answer, reasoning=thinking)
    asked = Message(role="system", content="Be brief."), Message(role="user", content="Was it so?")
    [one] = encoder.encode([Chat(messages=(*asked, said), origin="here")])
    own = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
    assert isinstance(one, list)
    assert [tokenizer.decode(part.labels) for part in one] == [f"{own}<|channel|>final<|message|>{answer}<|return|>"]
    [several] = encoder.encode([Chat(messages=(*asked, said, asked[1], said), origin="here")])
    assert isinstance(several, list)
    assert [tokenizer.decode(part.labels) for part in several] == 2 * [tokenizer.decode(one[0].labels)]
    history = tokenizer.decode(several[1].token_ids[: several[1].positions[0] + 1])
    assert history.endswith(
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|end|>"
        "<|start|>user<|message|>Was it so?<|end|><|start|>assistant"
    )
    assert encoder.end_of_turn() == tokenizer.convert_tokens_to_ids("<|return|>")


def test_a_turn_that_history_replaces_is_learnt_as_it_was_said() -> None:
    tokenizer, _ = tools("forgetful")
    parts = sequences("forgetful", CHATS["several turns"])
    said = [text.upper() for role, text in CHATS["several turns"] if role == "assistant"]
    assert [tokenizer.decode(part.labels) for part in parts] == [f"<|start_of_turn|>{text}<|im_end|>" for text in said]


def test_only_the_first_of_two_ends_is_learnt() -> None:
    tokenizer, _ = tools("phi")
    [sequence] = sequences("phi", CHATS["one turn"])
    assert tokenizer.decode(sequence.token_ids).endswith("how are you?<|end|>")


def test_special_tokens_inside_the_content_do_not_end_the_turn() -> None:
    tokenizer, _ = tools("chatml")
    [sequence] = sequences("chatml", [("user", "a"), ("assistant", "say <|im_end|> <|eos|>")])
    assert tokenizer.decode(sequence.labels) == "say <|im_end|> <|eos|><|im_end|>"


def test_every_position_predicts_the_next_token() -> None:
    tokenizer, _ = tools("chatml")
    [sequence] = sequences("chatml", CHATS["one turn"])
    first = sequence.positions[0]
    assert tokenizer.decode(sequence.token_ids[: first + 1]).endswith("<|im_start|>assistant\n")
    assert sequence.positions[-1] == sequence.num_tokens - 2
    assert sequence.token_ids.dtype == sequence.positions.dtype == "int32"


@pytest.mark.parametrize(
    ("family", "turns", "reason", "detail"),
    [
        ("chatml", [("user", "a")], Reason.NO_ASSISTANT, "roles found: user"),
        (
            "chatml",
            [("system", "a"), ("user", "b"), ("user", "c")],
            Reason.NO_ASSISTANT,
            "roles found: system, user",
        ),
        ("chatml", [("assistant", "a")], Reason.NO_PROMPT, "nothing comes before"),
        ("chatml", [("user", "a"), ("assistant", " \n")], Reason.EMPTY, "message 1"),
        ("chatml", [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")], Reason.EMPTY, "message 3"),
        ("gemma", [("system", "a"), ("user", "b"), ("assistant", "c")], Reason.TEMPLATE, "no system role"),
        ("r1", CHATS["one turn"], Reason.NOT_A_PREFIX, r"goes on '<think>\n', the chat 'Hello there"),
        ("counting", CHATS["several turns"], Reason.NOT_A_PREFIX, "goes on '1 messages"),
        ("plain_space", [("user", "a"), ("assistant", "the answer")], Reason.RETOKENISED, "Assistant: the answer"),
        ("chatml", [("user", "a"), ("assistant", "\n\nb")], Reason.RETOKENISED, r"assistant\n\n\nb"),
    ],
)
def test_a_chat_that_cannot_be_aligned_is_unusable(
    family: str, turns: list[tuple[str, str]], reason: Reason, detail: str
) -> None:
    result = encode(family, turns)
    assert isinstance(result, Unusable)
    assert (result.reason, detail in result.detail) == (reason, True), result


def test_a_prompt_without_an_answer_is_unusable_and_says_where_one_would_be() -> None:
    asked = chat_from_row({"prompt": "a", "response": "b"}, column="messages", origin="here")
    [result] = tools("chatml", "byte_level")[1].encode([asked])
    assert isinstance(result, Unusable)
    assert (result.reason, result.detail) == (Reason.NO_ASSISTANT, "a prompt, and no column 'completion'")


def test_a_boundary_is_not_enough_when_the_prompt_is_tokenised_otherwise() -> None:
    # GPT-2's pattern makes one token of two newlines at the end of a text, and two of them before a letter.
    result = encode("llama3", CHATS["one turn"], form="gpt2")
    assert isinstance(result, Unusable)
    assert result.reason is Reason.RETOKENISED


def test_results_come_in_the_order_of_the_chats() -> None:
    tokenizer, encoder = tools("chatml")
    texts = ["yes", "", "no"]
    results = encoder.encode([chat([("user", "a"), ("assistant", text)]) for text in texts])
    assert isinstance(results[1], Unusable)
    kept = [result[0] for result in results if isinstance(result, list)]
    assert [tokenizer.decode(s.labels) for s in kept] == ["yes<|im_end|>", "no<|im_end|>"]


def left_out(turns: list[tuple[str, str]], *numbers: int) -> Chat:
    whole = chat(turns)
    marked = [replace(m, is_trained=n not in numbers) for n, m in enumerate(whole.messages)]
    return replace(whole, messages=tuple(marked))


@pytest.mark.parametrize("family", TURN)
def test_a_turn_that_the_row_leaves_out_is_read_and_not_learnt(family: str) -> None:
    tokenizer, encoder = tools(family)
    turns = CHATS["several turns"]
    [[whole], [marked], [ended]] = encoder.encode([chat(turns), left_out(turns, 3), left_out(turns, 5)])  # type: ignore[misc]
    assert marked.token_ids.tolist() == whole.token_ids.tolist()
    said = [TURN[family].format(turns[number][1]) for number in (1, 5)]
    assert tokenizer.decode(marked.labels) == "".join(said)
    # Nothing is learnt from what follows the last turn that is: it is not there.
    assert ended.token_ids.tolist() == whole.token_ids.tolist()[: ended.num_tokens]
    assert tokenizer.decode(ended.labels).endswith(TURN[family].format(turns[3][1]))


def test_a_chat_of_which_no_turn_carries_loss_is_unusable() -> None:
    _, encoder = tools("chatml")
    [nothing] = encoder.encode([left_out(CHATS["several turns"], 1, 3, 5)])
    assert isinstance(nothing, Unusable)
    assert nothing.reason is Reason.UNTRAINED
    [last] = encoder.encode_last_turns([left_out(CHATS["several turns"], 5)])
    assert isinstance(last, Unusable)
    # A greeting that nothing comes before cannot be learnt, but read.
    greeted = [("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Yes?")]
    first, second = encoder.encode([chat(greeted), left_out(greeted, 0)])
    assert isinstance(first, Unusable)
    assert isinstance(second, list)


@pytest.mark.parametrize("family", [*TURN, "qwen3"])
def test_the_last_turn_alone_carries_loss_where_that_is_wanted(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    several = chat(CHATS["several turns"])
    [[sequence]] = ChatEncoder(tokenizer, only_last=True).encode([several])  # type: ignore[misc]
    [last] = ChatEncoder(tokenizer).encode_last_turns([several])
    assert isinstance(last, TokenSequence)
    assert sequence.labels.tolist() == last.labels.tolist()
    assert sequence.token_ids.tolist() == last.token_ids.tolist()
    text = prompt_ids(tokenizer, several.messages[:-1], is_prompt=True)
    assert sequence.token_ids.tolist()[: sequence.positions[0] + 1] == text


# As Qwen3's: thinking of its own, which is left out of turns that others follow.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content | default('') | trim }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reasoned(*reasoning: str) -> Chat:
    turns = [(Message(role="user", content="why?"), said(text)) for text in reasoning]
    return Chat(messages=tuple(message for turn in turns for message in turn), origin="here")


def said(reasoning: str) -> Message:
    return Message(role="assistant", content="so", reasoning=reasoning)


def test_reasoning_is_learnt_where_the_template_writes_it() -> None:
    tokenizer = chat_tokenizer(None)
    encoder = ChatEncoder(tokenizer, THINKING)
    first, second, none = encoder.encode([reasoned("it is so\n"), reasoned("I think\nit is so", "again"), reasoned("")])
    learnt = [[tokenizer.decode(s.labels) for s in found] for found in (first, second, none) if isinstance(found, list)]
    assert learnt == [
        ["<think>\nit is so\n</think>\n\nso<|im_end|>"],
        # Of the first turn it is no part any more when the second is asked for, as at inference: two sequences.
        ["<think>\nI think\nit is so\n</think>\n\nso<|im_end|>", "<think>\nagain\n</think>\n\nso<|im_end|>"],
        ["<think>\n\n</think>\n\nso<|im_end|>"],
    ]


def test_reasoning_that_the_template_leaves_out_makes_a_chat_unusable() -> None:
    [found] = tools("chatml")[1].encode([reasoned("it is so")])
    assert found == Unusable(reason=Reason.NO_REASONING, detail="message 1")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_templates_know_reasoning_by_either_name(name: str) -> None:
    tokenizer = chat_tokenizer(None)
    [[sequence]] = ChatEncoder(tokenizer, THINKING.replace("reasoning_content", name)).encode([reasoned("hm")])  # type: ignore[misc]
    assert tokenizer.decode(sequence.labels) == "<think>\nhm\n</think>\n\nso<|im_end|>"


def test_a_template_without_an_end_of_turn_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = ChatEncoder(chat_tokenizer("plain"))
    with caplog.at_level(logging.WARNING):
        encoder.encode([chat(CHATS["several turns"]), chat(CHATS["one turn"])])
    [record] = caplog.records
    assert record.getMessage().startswith("assistant turns do not end in a special token")
    caplog.clear()
    ChatEncoder(chat_tokenizer("chatml")).encode([chat(CHATS["one turn"])])
    assert caplog.records == []


def test_a_tokenizer_without_a_template_needs_one_from_the_configuration(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(None)
    with pytest.raises(ConfigError, match=r"no chat template.*set data\.chat_template to a Jinja file"):
        ChatEncoder(tokenizer)
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"])
    [[sequence]] = ChatEncoder(tokenizer, read_template(tmp_path / "t.jinja")).encode([chat(CHATS["one turn"])])  # type: ignore[misc]
    assert tokenizer.decode(sequence.labels) == "Hello there, how are you?<|im_end|>"


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"], encoding="utf-8-sig")
    assert read_template(tmp_path / "t.jinja") == TEMPLATES["chatml"]


def test_a_bad_template_is_refused_before_any_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        read_template(tmp_path / "absent.jinja")
    with pytest.raises(ConfigError, match=r"is not Jinja: .* line 2"):
        ChatEncoder(chat_tokenizer(None), "{% for m in messages %}\n{% if %}")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("{{ raise_exception('I never render') }}", "I never render"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ 'a' | dictsort }}", "items"),
        ("{{ '{}'.format() }}", "index"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_whatever_a_template_raises_makes_the_row_unusable(broken: str, why: str) -> None:
    encoder = ChatEncoder(chat_tokenizer(None), broken)
    [refused] = encoder.encode([chat(CHATS["one turn"])])
    [prompt] = encoder.encode_prompts([chat(CHATS["one turn"])])
    for found in (refused, prompt):
        assert isinstance(found, Unusable)
        assert found.reason is Reason.TEMPLATE
        assert why in found.detail


@pytest.mark.parametrize(("form", "date"), [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26")])
def test_todays_date_does_not_change_the_tokens(form: str, date: str) -> None:
    dated = "  {% if strftime_now is defined %}{{ strftime_now('" + form + "') }}{% endif %}" + TEMPLATES["chatml"]
    tokenizer = chat_tokenizer(None)
    [[sequence]] = ChatEncoder(tokenizer, dated).encode([chat(CHATS["one turn"])])  # type: ignore[misc]
    assert tokenizer.decode(sequence.token_ids).startswith(f"{date}<|im_start|>")


texts = st.text(
    st.sampled_from("ab .:\n\té日🎉") | st.characters(exclude_categories=["Cs"]), max_size=12
) | st.sampled_from(
    ["the answer", "<think>\nx\n</think>\n\ny", "Assistant: no", "<|im_end|>", "[/INST] yes", "\u0301a"]
)
chats = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=6).map(chat)


@settings(max_examples=300, deadline=None)
@given(chats, st.sampled_from(sorted(TEMPLATES)), st.sampled_from(HARD_FORMS))
def test_each_turn_follows_exactly_the_tokens_that_inference_would_see(turns: Chat, family: str, form: str) -> None:
    tokenizer, encoder = tools(family, form)
    [result] = encoder.encode([turns])
    if isinstance(result, Unusable):
        return
    numbers = [number for number, message in enumerate(turns.messages) if message.role == "assistant"]
    assert len(result) in (1, len(numbers))
    groups = [numbers] if len(result) == 1 else [[number] for number in numbers]
    for sequence, group in zip(result, groups, strict=True):
        whole = prompt_ids(tokenizer, turns.messages[: group[-1] + 1], is_prompt=False)
        assert sequence.token_ids.tolist() == whole[: sequence.num_tokens]
        carries_loss = set(sequence.positions.tolist())
        for number in group:
            prompt = prompt_ids(tokenizer, turns.messages[:number], is_prompt=True)
            assert sequence.token_ids[: len(prompt)].tolist() == prompt
            assert len(prompt) - 1 in carries_loss
            if turns.messages[number - 1].role != "assistant":
                assert len(prompt) - 2 not in carries_loss


@settings(max_examples=200, deadline=None)
@given(
    texts,
    texts.filter(str.strip),
    st.sampled_from(["chatml", "mistral", "plain", "plain_space"]),
    st.sampled_from(HARD_FORMS),
)
def test_a_turn_is_refused_only_when_its_prompt_would_be_tokenised_otherwise(
    question: str, answer: str, family: str, form: str
) -> None:
    tokenizer, encoder = tools(family, form)
    turns = chat([("user", question), ("assistant", answer)])
    [result] = encoder.encode([turns])
    prompt = prompt_ids(tokenizer, turns.messages[:1], is_prompt=True)
    whole = prompt_ids(tokenizer, turns.messages, is_prompt=False)
    assert isinstance(result, Unusable) == (whole[: len(prompt)] != prompt)
