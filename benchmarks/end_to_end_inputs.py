"""Makes the models and the chats that the end_to_end benchmark trains on; needs torch and transformers only."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 64


TEACHER = Shape(hidden=512, intermediate=1344, layers=8, heads=8, kv_heads=8)  # about 41M parameters
STUDENT = Shape(hidden=256, intermediate=704, layers=4, heads=4, kv_heads=4)  # about 11M


def prepare(
    folder: Path,
    *,
    num_chats: int,
    teacher: Shape = TEACHER,
    student: Shape = STUDENT,
    vocabulary_size: int = VOCABULARY_SIZE,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Two models with random weights, made on `device`; chats of 100 to 1200 tokens (mean about 366)."""
    inputs = Inputs(teacher=folder / "teacher", student=folder / "student", chats=folder / f"chats-{num_chats}.jsonl")
    if not (inputs.student / "config.json").exists():
        tokenizer = _word_tokenizer(vocabulary_size)
        for path, shape in ((inputs.teacher, teacher), (inputs.student, student)):
            torch.manual_seed(shape.hidden)
            with torch.device(device):
                lm = AutoModelForCausalLM.from_config(_config(shape, tokenizer), dtype=dtype)
            lm.save_pretrained(path)
            tokenizer.save_pretrained(path)
    if not inputs.chats.exists():
        rows = _chats(num_chats, vocabulary_size)
        inputs.chats.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return inputs


def _word_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerFast:
    """One token per word, so that lengths are what the benchmark says they are."""
    special = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(vocabulary_size - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=special[1:4]
    )
    fast.chat_template = TEMPLATE
    return fast


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )


def _chats(count: int, vocabulary_size: int) -> list[dict[str, list[dict[str, str]]]]:
    """Lengths are log-normal, cut to 100..1200; 62 % of a chat is the answer."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{draw.randrange(vocabulary_size - 6)}" for _ in range(n))

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
