"""The tokens of tiny models that read images, and the templates that write them."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 320

TINY_TEXT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
"""Of the language model's configuration, whatever its family."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
VISION_START, IMAGE_TOKEN, VISION_END = range(3, 6)

ROW_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<img>", "</img>", "[IMG_BREAK]", "[IMG_END]"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
ROW_IMAGE_TOKEN = 3

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATE = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
ROW_TEMPLATE = _TEMPLATE.replace("IMAGE", "<image>")


def save_tokenizer(path: Path) -> None:
    """Writes a byte-level BPE tokenizer with image tokens, trained on the standard library, to `path`."""
    _save(path, SPECIAL, CHAT_TEMPLATE, extra={})


def save_row_tokenizer(path: Path) -> None:
    """The same with the tokens of models whose image tokens are numbered as words are."""
    extra = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<image>",
        "video_token": "<end_of_utterance>",  # which nothing here writes
    }
    _save(path, ROW_SPECIAL, ROW_TEMPLATE, extra=extra)


def _save(path: Path, special: tuple[str, ...], template: str, *, extra: dict[str, str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([textwrap.__file__], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special[3:]),
        extra_special_tokens=extra,
        chat_template=template,
    ).save_pretrained(path)
