"""A teacher that is told more than the student reads the same response, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.chats.chat_rows import Chat, Message, TeacherColumns
from kdmesh.errors import ConfigError, DataError, InvalidRequest
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import InContext, Prompt, first_rows, teacher_side
from kdmesh_trainer.data.encoding.teacher_context import ContextEncoder, build_encoder
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.data.prompts import PromptPolicy, load_prompts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import DataConfig
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer

SYSTEM = {"kind": "system_prompt", "text": "The answer is no. Explain why."}
MESSAGES = {"kind": "messages"}
CHAT = (("user", "Was it so?"), ("assistant", "It was."), ("user", "why?"), ("assistant", "Nobody knows:\n\n1. one"))
TOLD = (("system", "Nobody knows anything."), ("user", "Was it so? Think about it. why?"))

Turns = tuple[tuple[str, str], ...]


def chat(turns: Turns, told: Turns = ()) -> Chat:
    return Chat(messages=messages(turns), teacher_messages=messages(told), origin="here")


def messages(turns: Turns) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=text) for role, text in turns)


def encoder(family: str, context: dict[str, Any]) -> ContextEncoder:
    data = DataConfig.model_validate({"train": {"format": "chat", "path": "a.jsonl"}, "teacher_context": context})
    built = build_encoder(chat_tokenizer(family), data)
    assert isinstance(built, ContextEncoder)
    return built


def encoded(family: str, context: dict[str, Any], given: Chat) -> InContext:
    [found] = encoder(family, context).encode([given])
    assert isinstance(found, list), found
    [sequence] = found
    assert isinstance(sequence, InContext)
    return sequence


def refused(family: str, context: dict[str, Any], given: Chat) -> Unusable:
    [found] = encoder(family, context).encode([given])
    assert isinstance(found, Unusable)
    return found


def ids(family: str, turns: Turns, *, is_prompt: bool = True) -> list[int]:
    found: list[int] = chat_tokenizer(family).apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=is_prompt,
        tokenize=True,
        return_dict=False,
    )
    return found


@pytest.mark.parametrize("family", ["chatml", "llama3", "phi", "qwen3", "mistral", "plain"])
def test_the_teacher_reads_its_own_prompt_and_then_the_very_same_response(family: str) -> None:
    sequence = encoded(family, MESSAGES, chat(CHAT, TOLD))
    [teacher] = teacher_side([sequence])
    start = teacher.positions[0] + 1
    assert teacher.token_ids[:start].tolist() == ids(family, TOLD)
    assert teacher.token_ids[start:].tolist() == sequence.labels.tolist() == teacher.labels.tolist()
    assert sequence.token_ids[: sequence.positions[0] + 1].tolist() == ids(family, CHAT[:3])


def test_only_the_last_turn_carries_loss() -> None:
    [[alone]] = ChatEncoder(chat_tokenizer("chatml")).encode([chat(CHAT)])
    sequence = encoded("chatml", MESSAGES, chat(CHAT, TOLD))
    assert sequence.token_ids.tolist() == alone.token_ids.tolist()
    assert chat_tokenizer("chatml").decode(sequence.labels) == "Nobody knows:\n\n1. one<|im_end|>"
    assert alone.num_rows > sequence.num_rows


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        (CHAT, (("system", SYSTEM["text"]), *CHAT[:3])),
        ((("system", "Be brief."), *CHAT), (("system", SYSTEM["text"] + "\n\nBe brief."), *CHAT[:3])),
    ],
)
def test_a_system_prompt_comes_before_what_the_chat_says(turns: Turns, told: Turns) -> None:
    sequence = encoded("chatml", SYSTEM, chat(turns))
    teacher = sequence.teacher
    assert teacher.token_ids[: teacher.positions[0] + 1].tolist() == ids("chatml", told)


def test_a_template_renders_the_chat_for_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("<|im_start|>system\nNobody knows.<|im_end|>\n" + TEMPLATES["chatml"])
    context = {"kind": "template", "path": str(tmp_path / "t.jinja")}
    sequence = encoded("chatml", context, chat(CHAT))
    teacher = sequence.teacher
    told = ids("chatml", (("system", "Nobody knows."), *CHAT[:3]))
    assert teacher.token_ids[: teacher.positions[0] + 1].tolist() == told


def test_a_template_that_prompts_otherwise_is_refused(tmp_path: Path) -> None:
    opened = TEMPLATES["chatml"].replace("assistant\n{% endif", "assistant\n<think>{% endif")
    (tmp_path / "t.jinja").write_text(opened)
    context = {"kind": "template", "path": str(tmp_path / "t.jinja")}
    [found] = encoder("chatml", context).encode_prompts([chat(CHAT)])
    assert isinstance(found, Unusable)
    assert found.reason == "the teacher would be prompted for another turn"
    assert "<think>" in found.detail


def test_a_template_that_renders_the_response_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"].replace("{{ m.content }}", "{{ m.content | upper }}"))
    context = {"kind": "template", "path": str(tmp_path / "t.jinja")}
    assert refused("chatml", context, chat(CHAT)).reason == "the teacher would read another response"


def test_messages_that_end_in_another_answer_are_refused() -> None:
    other = refused("chatml", MESSAGES, chat(CHAT, (*TOLD, ("assistant", "Everybody."))))
    assert other.reason == "the teacher would read another response"
    assert "Everybody." in other.detail
    same = encoded("chatml", MESSAGES, chat(CHAT, (*TOLD, CHAT[3])))
    assert same.teacher.token_ids.tolist() == encoded("chatml", MESSAGES, chat(CHAT, TOLD)).teacher.token_ids.tolist()


def test_what_the_template_refuses_for_the_teacher_alone_says_so() -> None:
    found = refused("gemma", MESSAGES, chat(CHAT, TOLD))  # a system message
    assert found.reason == "refused by the chat template"
    assert found.detail == "for the teacher: no system role"


_TEXT = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from(("<|im_end|>", "<|eot|>", "<|bos|>", "\n\n", " ", "é🎉", "</think>"))
    ),
    min_size=1,
    max_size=4,
).map("".join)


@settings(max_examples=60)
@given(
    family=st.sampled_from(("chatml", "llama3", "phi", "qwen3", "mistral", "plain", "plain_space", "harmony")),
    own=st.lists(_TEXT, min_size=1, max_size=3),
    told=st.lists(_TEXT, min_size=1, max_size=3),
    answer=_TEXT,
)
def test_no_token_of_a_response_differs_whatever_the_chats_hold(
    family: str, own: list[str], told: list[str], answer: str
) -> None:
    turns = [
        tuple(("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(texts)) for texts in (own, told)
    ]
    asked, context = (chat_turns if len(chat_turns) % 2 else chat_turns[:-1] for chat_turns in turns)
    [found] = encoder(family, MESSAGES).encode([chat((*asked, ("assistant", answer)), context)])
    if isinstance(found, Unusable):
        return
    [sequence] = found
    [teacher] = teacher_side(found)
    start, teacher_start = sequence.positions[0] + 1, teacher.positions[0] + 1
    assert sequence.token_ids[start:].tolist() == teacher.token_ids[teacher_start:].tolist()
    assert sequence.token_ids[:start].tolist() == ids(family, asked)
    assert teacher.token_ids[:teacher_start].tolist() == ids(family, context)


def test_prompts_come_in_pairs() -> None:
    [found] = encoder("chatml", MESSAGES).encode_prompts([chat(CHAT, TOLD)])
    assert isinstance(found, Prompt)
    assert found.teacher_ids is not None
    assert found.token_ids.tolist() == ids("chatml", CHAT[:3])
    assert found.teacher_ids.tolist() == ids("chatml", TOLD)


def row(answer: str, told: str | None) -> dict[str, Any]:
    own = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}]
    context = None if told is None else [{"role": "user", "content": told}]
    return {"messages": own, "teacher_messages": context}


def data_of(path: Path, rows: list[dict[str, Any]], **more: Any) -> DataConfig:
    (path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree = {"train": {"format": "chat", "path": str(path / "a.jsonl")}, "teacher_context": MESSAGES, **more}
    return DataConfig.model_validate(tree)


def load(data: DataConfig) -> list[TokenSequence]:
    reader = open_dataset(data.train, teacher=TeacherColumns(messages="teacher_messages"))
    return load_sequences("train", reader, build_encoder(chat_tokenizer("chatml"), data), data).sequences


def test_a_file_gives_both_sides_in_the_order_of_its_rows(tmp_path: Path) -> None:
    sequences = load(data_of(tmp_path, [row(str(n), f"Think of {n}. why?") for n in range(300)]))
    tokenizer = chat_tokenizer("chatml")
    for number, (own, theirs) in enumerate(zip(sequences, teacher_side(sequences), strict=True)):
        assert f"Think of {number}. why?" in tokenizer.decode(theirs.token_ids)
        assert tokenizer.decode(own.labels) == tokenizer.decode(theirs.labels) == f"{number}<|im_end|>"


def test_a_row_without_the_column_is_refused_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: no column 'teacher_messages', which data\.teacher_context names"):
        load(data_of(tmp_path, [row("a", "b"), row("a", None)]))


def test_a_long_response_is_cut_at_the_same_token_on_both_sides(tmp_path: Path) -> None:
    [own] = load(data_of(tmp_path, [row("It was so. " * 30, "Think. " * 50 + "why?")], max_tokens=40))
    [theirs] = teacher_side([own])
    assert own.num_tokens == 40
    assert own.labels.tolist() == theirs.labels.tolist()
    assert theirs.num_tokens == theirs.positions[-1] + 2 > 100


def test_the_students_prompt_alone_decides_what_is_too_long(tmp_path: Path) -> None:
    data = data_of(tmp_path, [row("a", "Think. " * 50 + "why?")])
    reader = open_dataset(data.train, teacher=TeacherColumns(messages="teacher_messages"))
    policy = PromptPolicy(max_tokens=14, too_long="fail", unusable="fail")
    [prompt] = load_prompts("train", reader, build_encoder(chat_tokenizer("chatml"), data), policy).prompts
    assert prompt.teacher_ids is not None
    assert len(prompt.teacher_ids) > 50


def test_sides_with_other_loss_tokens_are_refused() -> None:
    def sequence(*token_ids: int) -> TokenSequence:
        return TokenSequence(token_ids=np.array(token_ids, np.int32), positions=np.array([1, 2], np.int32))

    own, other = sequence(1, 2, 3, 4), sequence(1, 2, 3, 5)
    with pytest.raises(InvalidRequest, match="they must be the same tokens"):
        InContext(token_ids=own.token_ids, positions=own.positions, teacher=other)
    pair = InContext(token_ids=own.token_ids, positions=own.positions, teacher=sequence(9, 9, 3, 4))
    cut = first_rows(pair, 1)
    assert isinstance(cut, InContext)
    assert (cut.token_ids.tolist(), cut.teacher.token_ids.tolist()) == ([1, 2, 3], [9, 9, 3])


def test_a_reader_of_ones_own_gives_no_second_chat() -> None:
    with pytest.raises(ValueError, match="a reader of your own gives no second chat"):
        DataConfig.model_validate({"train": {"format": "custom", "target": "a:b"}, "teacher_context": MESSAGES})


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        encoder("chatml", {"kind": "template", "path": str(tmp_path / "absent.jinja")})
