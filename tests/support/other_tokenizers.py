"""A tokenizer of another family than that of the tiny models."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<|answer|>{{ m.content }}</s>"
    "{% else %}<|ask|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def save_sentence_piece(path: Path, *, size: int = 260) -> int:
    """Writes one with byte tokens, BOS and a template, trained on the standard library; the size of its vocabulary."""
    special = ["<unk>", "<s>", "</s>", "<|ask|>", "<|answer|>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train([textwrap.__file__], trainer)
    backend = with_byte_tokens(backend)
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    made.save_pretrained(path)
    return len(made)


def with_byte_tokens(backend: Tokenizer) -> Tokenizer:
    """As SentencePiece adds them to a vocabulary, which no trainer here does."""
    written = json.loads(backend.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    written["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(written))
