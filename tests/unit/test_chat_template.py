"""Variables of a chat template have what a configuration gives them, in training and in the trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdmesh.answering.chat_tokens import ChatTokens
from kdmesh.answering.prompt_rows import Asked
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.chats.chat_template import TemplateSetting, with_settings
from kdmesh.errors import ConfigError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.teacher_context import build_encoder
from kdmesh_trainer.data.encoding.templated import student_tokenizer, teacher_tokenizer
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig, OtherTokenizer
from tests.support.chat_tokenizers import chat_tokenizer

# As Qwen3's: an answer without thinking has an empty one, which is the prompt's if there shall be none.
HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "why"}]


def hybrid(path: Path) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = HYBRID
    tokenizer.save_pretrained(path)
    return tokenizer


def rendered(template: str, **given: object) -> str:
    text: str = chat_tokenizer("chatml").apply_chat_template(ASKED, chat_template=template, tokenize=False, **given)
    return text


def loss_text(tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> str:
    turns = (Message(role="user", content="why"), Message(role="assistant", content="because"))
    [[sequence]] = build_encoder(tokenizer, data).encode([Chat(messages=turns, origin="here")])  # type: ignore[misc]
    assert isinstance(sequence, TokenSequence)
    return str(tokenizer.decode(sequence.labels))


def test_what_a_setting_puts_into_the_prompt_carries_no_loss(tmp_path: Path) -> None:
    hybrid(tmp_path)
    train = ChatFile(path=tmp_path / "chats.jsonl")
    plain, set_ = (
        DataConfig(train=train, chat_template_settings=settings) for settings in ({}, {"enable_thinking": False})
    )
    assert loss_text(student_tokenizer(tmp_path, plain), plain) == "<think>\n\n</think>\n\nbecause<|im_end|>"
    assert loss_text(student_tokenizer(tmp_path, set_), set_) == "because<|im_end|>"


def test_the_trained_model_is_written_with_it_and_a_request_may_say_otherwise(tmp_path: Path) -> None:
    own = hybrid(tmp_path / "model")
    data = DataConfig(train=ChatFile(path=tmp_path / "chats.jsonl"), chat_template_settings={"enable_thinking": False})
    student_tokenizer(tmp_path / "model", data).save_pretrained(tmp_path / "final")
    final = AutoTokenizer.from_pretrained(tmp_path / "final")
    how = {"tokenize": False, "add_generation_prompt": True}
    assert final.apply_chat_template(ASKED, **how) == own.apply_chat_template(ASKED, enable_thinking=False, **how)
    assert final.apply_chat_template(ASKED, enable_thinking=True, **how) == own.apply_chat_template(ASKED, **how)


def test_a_teacher_with_another_tokenizer_has_settings_of_its_own(tmp_path: Path) -> None:
    own = hybrid(tmp_path)
    other = OtherTokenizer(path=tmp_path, chat_template_settings={"enable_thinking": False})
    how = {"tokenize": False, "add_generation_prompt": True}
    found = teacher_tokenizer(other).apply_chat_template(ASKED, **how)
    assert found == own.apply_chat_template(ASKED, enable_thinking=False, **how)


def test_generate_prompts_with_it(tmp_path: Path) -> None:
    own = hybrid(tmp_path)
    asked = Asked(number=0, origin="line 1", messages=ASKED, turns=(Message(role="user", content="why"),))
    ids, _ = ChatTokens(tmp_path, {"enable_thinking": False}).prompt(asked)
    text = own.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert ids.tolist() == own(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("value", [True, False, 3, 0.5, "low", 'it\'s "so" %} {{ x }} \\n\n 🎉\u2028é'])
def test_a_template_sees_the_value_as_it_is(value: TemplateSetting) -> None:
    template = with_settings("{{ effort is string }} {{ effort }}", {"effort": value}, key="here")
    assert rendered(template) == f"{isinstance(value, str)} {value}"


@pytest.mark.parametrize("template", ["\n\n{{ effort }}", "  {{ effort }}", "{% if effort %}\nx{% endif %}"])
def test_nothing_else_of_a_template_changes(template: str) -> None:
    assert rendered(with_settings(template, {"effort": "low"}, key="here")) == rendered(template, effort="low")
    assert with_settings(template, {}, key="here") == template


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("efort", r"here: the chat template has no variable 'efort'"),
        ("messages", r"here: 'messages' is no variable that can be set"),
        ("bos_token", r"'bos_token' is no variable"),
        ("a b", r"'a b' is no variable"),
    ],
)
def test_a_setting_without_an_effect_is_refused(name: str, refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        with_settings("{{ bos_token }}{{ messages }}{{ effort }} a b", {name: 1}, key="here")
