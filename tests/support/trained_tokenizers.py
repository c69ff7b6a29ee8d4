"""Tokenizers of three families, trained on a few lines with accents, CJK, emoji, tabs and newlines."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.other_tokenizers import with_byte_tokens

CORPUS = [
    "The student learns what the teacher would have said there.\nEvery token counts.\n\n",
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "Ein süßer Käse für 3,50 €; à bientôt, señor! Ærø, naïve façade.",
    "日本語の文章です。東京と大阪。中文也要对齐。한국어 문장입니다.",
    "Emoji: 👩‍👩‍👧‍👦 🎉🎉 👍🏽 and flags 🇩🇪🇯🇵.",
    "\tTabs, \r\n carriage returns,  double  spaces   and three.",
]
TEXTS = [*CORPUS, "".join(CORPUS), "unseen Wörter, 未知の漢字 ☃ mixed: x²≥y", " leading and trailing "]
KINDS = ["byte_level", "byte_level_small", "sentence_piece", "sentence_piece_bytes", "word_piece"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of KINDS."""
    special = ["<unk>", "<s>", "</s>"]
    if kind.startswith("byte_level"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        size = 600 if kind == "byte_level" else 300
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            max_token_length=8,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind.startswith("sentence_piece"):
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, max_token_length=8)
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special)
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "sentence_piece_bytes":
        backend = with_byte_tokens(backend)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return made
