"""How much of a text two tokenizers have in common: matched by bytes, and by a walk over token strings."""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import finish, say, table
from kdmesh.alignment.chunks import align
from kdmesh.alignment.spans import Spans, spans_of_text
from kdmesh.alignment.token_bytes import token_bytes

_MOST_TOKENS = 32
_MARKS = (
    "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
    "\N{LOWER ONE EIGHTH BLOCK}",
    "##",
)  # of a word's begin or middle
_TEXTS = {
    "accents": "Ein süßer Käse für 3,50 €; à bientôt, señor! Ærø, naïve façade, crème brûlée und Äpfel.\n",
    "CJK": "日本語の文章です。東京と大阪へ行きました。中文也要对齐。한국어 문장도 있습니다.\n",
    "emoji": "Well done 🎉🎉 👍🏽, says the 👩‍👩‍👧‍👦 family from 🇩🇪 and 🇯🇵 \N{SNOWMAN}.\n",
    "newlines": "First line.\n\nSecond paragraph,\twith a tab.\r\n    Indented   code:\n\n\nEnd.\n",
}
_SPECIAL = ["<unk>", "<s>", "</s>"]


def main() -> None:
    """Print two tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer files: shows that it runs, measures little")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 6 if parser.parse_args().quick else 60]
    corpus = [file.read_text(encoding="utf-8", errors="replace")[:40_000] for file in files]
    held_out = {"code and English": "".join(text[-2000:] for text in corpus[::3]), **_TEXTS}
    made = {kind: _train(kind, [*corpus, *(text * 3 for text in _TEXTS.values())]) for kind in _KINDS}
    cells, figures, seconds = [], {}, 0.0
    for student, teacher in itertools.product(_KINDS, repeat=2):
        if student == teacher:
            continue
        ours = walked = total = 0
        for text in held_out.values():
            both = [spans_of_text(made[kind], text, token_bytes(made[kind])) for kind in (student, teacher)]
            began = time.perf_counter()
            ours += align(both[0], text.encode(), both[1], text.encode(), most_tokens=_MOST_TOKENS).aligned_bytes
            seconds += time.perf_counter() - began
            walked += _walked_bytes(made[student], made[teacher], both[0], both[1])
            total += len(text.encode())
        figures[f"{student} / {teacher}"] = {"by_bytes": round(ours / total, 4), "by_walk": round(walked / total, 4)}
        cells.append([student, teacher, f"{ours / total:.1%}", f"{walked / total:.1%}"])
    say(f"{total} bytes, runs of at most {_MOST_TOKENS} tokens; the walk follows KDFlow's description:")
    table(["student", "teacher", "aligned bytes", "the walk"], cells)
    say(f"matching took {seconds / len(cells) * 1e3:.1f} ms a pair")
    finish("alignment", {"aligned": figures, "milliseconds_per_pair": round(seconds / len(cells) * 1e3, 2)})


_KINDS = ("byte-level 8k", "byte-level 2k", "SentencePiece", "WordPiece")


def _train(kind: str, corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    trainer: trainers.Trainer
    if kind.startswith("byte-level"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=8000 if kind.endswith("8k") else 2000,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "SentencePiece":
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=6000, special_tokens=_SPECIAL, max_token_length=16, show_progress=False
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=6000, special_tokens=_SPECIAL, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    if kind == "SentencePiece":  # its byte tokens, which no trainer here adds
        written = json.loads(backend.to_str())
        vocabulary = written["model"]["vocab"]
        vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
        written["model"]["byte_fallback"] = True
        backend = Tokenizer.from_str(json.dumps(written))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _walked_bytes(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, own: Spans, theirs: Spans) -> int:
    """Bytes of the student's tokens that a walk over both lists of token strings pairs.

    It pairs tokens that are equal after equal histories, and otherwise goes on with the shorter history.
    """
    one = [_stripped(token) for token in student.convert_ids_to_tokens(own.token_ids.tolist())]
    other = [_stripped(token) for token in teacher.convert_ids_to_tokens(theirs.token_ids.tolist())]
    i = j = found = 0
    own_history = their_history = ""
    while i < len(one) and j < len(other):
        if own_history == their_history and one[i] == other[j]:
            found += int(own.ends[i]) - (int(own.ends[i - 1]) if i else 0)
        ahead = len(own_history) - len(their_history)
        if ahead <= 0:
            own_history += one[i]
            i += 1
        if ahead >= 0:
            their_history += other[j]
            j += 1
    return found


def _stripped(token: str) -> str:
    for mark in _MARKS:
        token = token.removeprefix(mark)
    return token


if __name__ == "__main__":
    main()
