"""Writes model directories without weights: a tokenizer trained on the corpus, and a small architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdmesh.demo.corpus import Corpus

_PAD, _BEGIN, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A Qwen3 of any size; its head is tied to its embedding."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int

    def num_parameters(self, vocabulary_size: int) -> int:
        """Trained numbers, embedding included."""
        head = self.hidden_size // self.heads
        attention = 2 * self.hidden_size * head * (self.heads + self.key_value_heads) + 2 * head
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return vocabulary_size * self.hidden_size + self.layers * layer + self.hidden_size


def train_tokenizer(corpus: Corpus, vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE of the training side, so that nothing is unknown to it. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[_PAD, _BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return tokenizer


def write_model(directory: Path, architecture: Architecture, tokenizer: Tokenizer, *, max_tokens: int) -> None:
    """Write config.json and the tokenizer; the weights are the trainer's, with `student.weights: random`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": _PAD,
            "eos_token": _END,
            "model_max_length": max_tokens,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    end = tokenizer.token_to_id(_END)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "dtype": "float32",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.intermediate_size,
            "num_hidden_layers": architecture.layers,
            "num_attention_heads": architecture.heads,
            "num_key_value_heads": architecture.key_value_heads,
            "head_dim": architecture.hidden_size // architecture.heads,
            "hidden_act": "silu",
            "max_position_embeddings": max_tokens,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": tokenizer.token_to_id(_PAD),
        },
    )


def _texts(corpus: Corpus) -> Iterator[str]:
    for example in corpus.train:
        yield example.source
        yield example.docstring


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
