"""Tools, calls of them and their answers reach the chat template, and calls carry loss as answers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdmesh.chats.chat_rows import Chat, chat_from_row
from kdmesh.errors import DataError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import InContext
from kdmesh_trainer.data.encoding.teacher_context import build_encoder
from kdmesh_trainer.data.encoding.turns import Reason, Unusable
from kdmesh_trainer.data.files.readers import open_dataset
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig
from tests.support.chat_tokenizers import TEMPLATES, chat_tokenizer

# A call opens and closes in special tokens of its own, as DeepSeek's, and names the answer that it got.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}{{ '\n' }}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<|start_header|>{{ call.function.name }} {{ call.function.arguments | tojson }}<|end_header|>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTEGER = {"type": "integer"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": INTEGER}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "1 + 1?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "2", "tool_call_id": "c1"}
ANSWER = {"role": "assistant", "content": "It is 2."}
ROW: dict[str, Any] = {"tools": [TOOL], "messages": [USER, CALLING, TOLD, ANSWER]}


def chat(row: dict[str, Any]) -> Chat:
    return chat_from_row(row, column="messages", origin="here")


def encoded(row: dict[str, Any], template: str = TEMPLATE) -> list[TokenSequence] | Unusable:
    [found] = ChatEncoder(chat_tokenizer(None), template).encode([chat(row)])
    return found


def test_calls_carry_loss_to_the_token_that_ends_their_turn() -> None:
    tokenizer = chat_tokenizer(None)
    found = encoded(ROW)
    assert isinstance(found, list)
    [sequence] = found
    text = tokenizer.apply_chat_template(ROW["messages"], tools=[TOOL], chat_template=TEMPLATE, tokenize=False)
    text = text.replace("None", "")  # of the content that is null
    assert tokenizer.decode(sequence.token_ids) + "\n" == text
    said = '<|start_header|>add {"a": 1}<|end_header|><|im_end|>'
    assert tokenizer.decode(sequence.labels) == f"{said}It is 2.<|im_end|>"


def test_a_call_in_a_channel_is_learnt_to_its_own_end() -> None:
    tokenizer = chat_tokenizer(None)
    found = encoded(ROW, TEMPLATES["channels"])
    assert isinstance(found, list)
    assert [tokenizer.decode(sequence.labels) for sequence in found] == [
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|channel|>final<|message|>It is 2.<|return|>"
    ]


def test_thinking_before_a_call_that_the_answer_removes_makes_a_chat_unusable() -> None:
    found = encoded({**ROW, "messages": [USER, {**CALLING, "thinking": "hm"}, TOLD, ANSWER]}, TEMPLATES["channels"])
    assert isinstance(found, Unusable)
    assert found.reason is Reason.NOT_A_PREFIX
    learnt = encoded({**ROW, "messages": [USER, {**CALLING, "thinking": "hm"}]}, TEMPLATES["channels"])
    assert isinstance(learnt, list)


def test_a_prompt_tells_of_tools_and_of_what_they_answered() -> None:
    tokenizer = chat_tokenizer(None)
    [prompt] = ChatEncoder(tokenizer, TEMPLATE).encode_prompts([chat(ROW)])
    assert not isinstance(prompt, Unusable)
    text = tokenizer.decode(prompt.token_ids)
    assert '"name": "add"' in text
    assert text.endswith("<|im_start|>tool c1\n2<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "row",
    [
        {"tools": json.dumps([TOOL])},
        {"tools": [{**TOOL, "strict": None}]},
        {"messages": [USER, {**CALLING, "content": ""}, TOLD, ANSWER]},
        {"messages": [USER, {**CALLING, "tool_calls": json.dumps([CALL])}, TOLD, ANSWER]},
        {
            "messages": [
                USER,
                {**CALLING, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]},
                TOLD,
                ANSWER,
            ]
        },
    ],
    ids=["tools as text", "null", "empty content", "calls as text", "arguments as text"],
)
def test_every_usual_form_of_tools_and_calls_is_the_same(row: dict[str, Any]) -> None:
    whole, other = encoded(ROW), encoded(ROW | row)
    assert isinstance(whole, list) and isinstance(other, list)
    assert other[0].token_ids.tolist() == whole[0].token_ids.tolist()
    assert other[0].labels.tolist() == whole[0].labels.tolist()


def test_a_parquet_row_has_the_tools_of_no_other(tmp_path: Path) -> None:
    other = {
        "type": "function",
        "function": {"name": "sub", "parameters": {"type": "object", "properties": {"b": INTEGER}}},
    }
    rows = [ROW, {"tools": [other], "messages": [USER, ANSWER]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = open_dataset(ChatFile(path=tmp_path / "a.parquet"))()
    assert [tool["function"]["name"] for tool in (*first.tools, *second.tools)] == ["add", "sub"]
    assert first.tools[0]["function"]["parameters"]["properties"] == {"a": INTEGER}
    assert second.tools[0]["function"]["parameters"]["properties"] == {"b": INTEGER}
    assert first.messages[1].tool_calls == (CALL,)


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        (ROW, TEMPLATES["chatml"], Reason.NO_CALLS),
        ({**ROW, "messages": [USER, ANSWER]}, TEMPLATES["chatml"], Reason.NO_TOOLS),
        ({**ROW, "messages": [USER, {"role": "assistant", "content": ""}]}, TEMPLATE, Reason.EMPTY),
    ],
)
def test_what_a_template_leaves_out_makes_a_chat_unusable(row: dict[str, Any], template: str, reason: Reason) -> None:
    found = encoded(row, template)
    assert isinstance(found, Unusable)
    assert found.reason is reason


@pytest.mark.parametrize(
    "template",
    [TEMPLATES["chatml"], TEMPLATE.replace("{% for call in m.tool_calls or [] %}", "{% for call in [] %}")],
    ids=["tools and calls", "calls alone"],
)
def test_calls_before_the_turn_that_is_trained_or_asked_for_are_missed_too(template: str) -> None:
    row = {**({} if template == TEMPLATES["chatml"] else {"tools": [TOOL]}), "messages": ROW["messages"]}
    left_out = Unusable(reason=Reason.NO_CALLS, detail="1 calls before it")
    tokenizer = chat_tokenizer(None)
    [last] = ChatEncoder(tokenizer, template, only_last=True).encode([chat(row)])
    assert last == left_out
    [prompt] = ChatEncoder(tokenizer, template).encode_prompts([chat(row)])
    assert prompt == left_out
    [seen] = ChatEncoder(tokenizer, TEMPLATE, only_last=True).encode([chat(ROW)])
    assert isinstance(seen, list)


def test_a_turn_that_a_template_ends_twice_ends_with_what_ends_other_turns() -> None:
    twice = TEMPLATE.replace(
        "<|im_end|>\n{% endfor %}{% if add",
        "<|im_end|>\n{% endfor %}{% if not add_generation_prompt %}<|eos|>{% endif %}{% if add",
    )
    found = encoded({**ROW, "messages": [USER, CALLING]}, twice)
    assert isinstance(found, list)
    assert chat_tokenizer(None).decode(found[0].labels).endswith("<|end_header|><|im_end|>")


def test_a_teacher_that_is_told_more_has_the_tools_too() -> None:
    told = {"kind": "system_prompt", "text": "Be brief."}
    data = DataConfig.model_validate({"train": {"format": "chat", "path": "a.jsonl"}, "teacher_context": told})
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = TEMPLATE
    [found] = build_encoder(tokenizer, data).encode([chat(ROW)])
    assert isinstance(found, list)
    [sequence] = found
    assert isinstance(sequence, InContext)
    for side in (sequence, sequence.teacher):
        assert '"name": "add"' in tokenizer.decode(side.token_ids)
        assert tokenizer.decode(side.labels) == "It is 2.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        ({**ROW, "tools": {"name": "add"}}, "here: tools must be a list, not dict"),
        ({**ROW, "tools": "add"}, "here: tools is a text that is not JSON"),
        ({**ROW, "tools": [{"type": "function"}]}, r"here: tools\[0\] must be a function with a name"),
        ({**ROW, "tools": ["add"]}, r"here: tools\[0\] must be a function with a name"),
        ({**ROW, "messages": [{**USER, "tool_calls": [CALL]}]}, "'tool_calls' at a turn of the user"),
        ({**ROW, "messages": [USER, {**CALLING, "tool_calls": []}]}, "`content` is missing or null"),
        ({**ROW, "messages": [USER, CALLING, {**TOLD, "tool_call_id": "\ud800"}]}, r"messages\[2\].* half a surrogate"),
        ({**ROW, "functions": [TOOL]}, "`functions` is not supported; a chat is messages and `tools`"),
    ],
)
def test_what_is_no_tool_and_no_call_is_refused(row: dict[str, Any], refused: str) -> None:
    with pytest.raises(DataError, match=refused):
        chat(row)


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("key", ["tools", "tool_calls"])
def test_what_is_nested_deeper_than_python_follows_is_refused(key: str, is_text: bool) -> None:
    deep = f'[{{"name": "f", "arguments": {{"a": {"[" * 900 + "]" * 900}}}}}]'
    value = deep if is_text else json.loads(deep)
    answer = {"role": "assistant", "content": "x", **({key: value} if key == "tool_calls" else {})}
    row = {"messages": [{"role": "user", "content": "x"}, answer], **({key: value} if key == "tools" else {})}
    with pytest.raises(DataError, match=rf"here.*: .*{key} is nested too deeply"):
        chat_from_row(row, column="messages", origin="here")


def test_a_template_that_leaves_tools_out_gives_no_prompt() -> None:
    chat = chat_from_row({"tools": [TOOL], "messages": [USER]}, column="messages", origin="a:1")
    [prompt] = ChatEncoder(chat_tokenizer("chatml")).encode_prompts([chat])
    assert prompt == Unusable(reason=Reason.NO_TOOLS, detail="1 tools")
    [prompt] = ChatEncoder(chat_tokenizer(None), TEMPLATE).encode_prompts([chat])
    assert not isinstance(prompt, Unusable)
    assert "add" in chat_tokenizer(None).decode(prompt.token_ids)
