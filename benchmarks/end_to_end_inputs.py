"""Makes the models and the chats that the end_to_end benchmark trains on; needs torch and transformers only."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY_SIZE = 32_000
MAX_TOKENS = 1024
SEQUENCES_PER_STEP = 8
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Where everything lies."""

    teacher: Path
    student: Path
    chats: Path


def prepare(folder: Path, *, num_chats: int) -> Inputs:
    """Teacher of about 41M parameters, student of about 11M, chats of 100 to 1200 tokens (mean about 366)."""
    inputs = Inputs(teacher=folder / "teacher", student=folder / "student", chats=folder / f"chats-{num_chats}.jsonl")
    if not (inputs.student / "config.json").exists():
        tokenizer = _word_tokenizer()
        _save(inputs.teacher, tokenizer, hidden=512, layers=8, heads=8)
        _save(inputs.student, tokenizer, hidden=256, layers=4, heads=4)
    if not inputs.chats.exists():
        inputs.chats.write_text("".join(json.dumps(row) + "\n" for row in _chats(num_chats)), encoding="utf-8")
    return inputs


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that lengths are what the benchmark says they are."""
    special = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(VOCABULARY_SIZE - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=special[1:4]
    )
    fast.chat_template = TEMPLATE
    return fast


def _save(path: Path, tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, heads: int) -> None:
    torch.manual_seed(hidden)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _chats(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Lengths are log-normal, cut to 100..1200; 62 % of a chat is the answer."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY_SIZE - 6)}" for _ in range(n))

    chats = []
    for _ in range(count):
        length = min(1200, max(100, round(draw.lognormvariate(5.72, 0.6))))
        answer = round(length * 0.62)
        chats.append(
            {
                "messages": [
                    {"role": "user", "content": words(length - answer - 3)},
                    {"role": "assistant", "content": words(answer)},
                ]
            }
        )
    return chats
