"""Small tokenizers, trained on the spot, with the chat templates of several families."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>",
    "<|start_of_turn|>", "<|end_of_turn|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|call|>",
)  # fmt: skip

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

TEXT = """
A teacher is asked for the hidden states of the positions that carry loss. The student learns from them
what the teacher would have said there. Hello there, how are you? Hello again: the answer is yes, the
answer is no. Every token counts, so the tokens that the student sees must be the tokens that it would
see when it is asked. Was it so? It was. Two newlines follow.

And three follow here, with  two  spaces   and three.


User: what is the answer? Assistant: the answer is forty-two. User: why? Assistant: nobody knows why.
"""

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "<|bos|>{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
    ),
    "gemma": (
        "<|bos|>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|start_of_turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end_of_turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_turn|>model\n{% endif %}"
    ),
    "mistral": (
        "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|eos|>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    # Two ends after the last turn, one after the others.
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|eos|>{% endif %}"
    ),
    # Another end for the last turn than for the others.
    "harmony": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # As gpt-oss's: a turn is messages in channels, of which the prompt gives the role alone. Thinking before an answer
    # is left out of history, and before a call once an answer follows; a call has an end of its own.
    "channels": (
        "<|start|>system<|message|>You are a model.<|end|>"
        "{% if tools %}<|start|>developer<|message|># Tools\n{% for t in tools %}\n{{ t.function.name }}{% endfor %}"
        "<|end|>{% endif %}{% for m in messages %}{% set own = loop.index0 %}{% if m.role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
        "{% elif m.role == 'assistant' %}{% set later = namespace(answers=0) %}"
        "{% for n in messages %}{% if loop.index0 > own and n.role == 'assistant' and not n.tool_calls %}"
        "{% set later.answers = 1 %}{% endif %}{% endfor %}"
        "{% if m.thinking and (not later.answers if m.tool_calls else loop.last and not add_generation_prompt) %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "{% for call in m.tool_calls or [] %}<|start|>assistant to=functions.{{ call.function.name }}"
        "<|channel|>commentary json<|message|>{{ call.function.arguments | tojson }}<|call|>{% endfor %}"
        "{% if not m.tool_calls %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
        "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content }}"
        "<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    # The thinking of all turns but the last is left out, and the last one always has some.
    "qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '</think>' in m.content %}{% if loop.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
        "{% elif m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Assistant turns open with a special token, are changed, and are left out once they are history.
    "forgetful": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<|start_of_turn|>"
        "{{ m.content | upper if loop.last else '...' }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The generation prompt opens the thinking, which the rendered chat leaves out.
    "r1": (
        "<|bos|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|eos|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    # The first line depends on all messages.
    "counting": (
        "{{ messages | length }} messages\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # No special token at all.
    "plain": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    # The same, with a generation prompt that ends inside a token.
    "plain_space": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
}


def chat_tokenizer(family: str | None, *, form: str = "byte_level") -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS to bare text, with the template of `family`; None gives it none.

    Args:
        form: "byte_level" as Llama's and Qwen's, "gpt2" with the older pattern (the offsets of both trimmed),
            "metaspace" as Gemma's, with byte fallback.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(form)),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL[2:]),
    )
    if family is not None:
        tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


@cache
def _trained(form: str) -> str:
    match form:
        case "byte_level":
            split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer = _train_byte_level(pre_tokenizers.Sequence([split, byte_level]))
        case "gpt2":
            tokenizer = _train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
        case _:
            tokenizer = _train_metaspace()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    adds_bos = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), adds_bos])
    serialised: str = tokenizer.to_str()
    return serialised


def _train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _train_metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = _train(tokenizer)
    serialised = json.loads(tokenizer.to_str())
    vocabulary = serialised["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    serialised["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(serialised))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _train(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=list(SPECIAL), show_progress=False, **options)
    tokenizer.train_from_iterator([TEXT, *TEMPLATES.values()], trainer)
    return tokenizer
