"""A dataset from its text, by one process and several, and from files of token ids: rows per second, and memory."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import finish, say, table
from kdmesh_trainer.data.encoding.recipe import EncoderRecipe
from kdmesh_trainer.data.files.readers import open_files
from kdmesh_trainer.data.kept.token_cache import TokenCache
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig

_MIB = 2**20
_VOCABULARY = 8000
_ANSWER_CHARACTERS = 2000
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _sources() -> list[Path]:
    """This machine's standard library."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _write_tokenizer(path: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(source) for source in _sources()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=_TEMPLATE)
    made.save_pretrained(path)


def _write_chats(path: Path, rows: int) -> None:
    """Chats of one question, and one piece of the library as its answer."""
    text = "".join(source.read_text(encoding="utf-8", errors="ignore") for source in _sources())
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            begin = number * _ANSWER_CHARACTERS % (len(text) - _ANSWER_CHARACTERS)
            answer = text[begin : begin + _ANSWER_CHARACTERS]
            messages = [
                {"role": "user", "content": f"What stands at {begin}?"},
                {"role": "assistant", "content": f"{answer} ({number})"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Bytes of memory without a file behind it, the most that this process had, once the context has ended."""
    most, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            most[0] = max(most[0], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        is_over.set()
        thread.join()
        most[0] = max(most[0], _anonymous_bytes())


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _child(directory: Path, cache: str | None, workers: int) -> None:
    """Read the dataset in one way, and print what that took."""
    logging.disable()
    data = DataConfig.model_validate(
        {
            "train": {"format": "chat", "path": str(directory / "chats.jsonl")},
            "token_cache": None if cache is None else {"directory": cache, "workers": workers},
        }
    )
    recipe = EncoderRecipe(student=directory / "tokenizer", data=data)
    tokenizer = recipe.tokenizer()
    encoder = recipe.encoder(tokenizer)
    assert isinstance(data.train, ChatFile)
    files = open_files(data.train)
    before_bytes, began_s = _anonymous_bytes(), time.perf_counter()
    with _watched() as most:
        if data.token_cache is None:
            sequences: Any = load_sequences("train", files, encoder, data).sequences
        else:
            kept = TokenCache(data.token_cache, recipe, encoder, recipe.ingredients(tokenizer))
            sequences = kept.sequences("train", files)
        took_s = time.perf_counter() - began_s
    told = {"rows": len(sequences), "seconds": took_s, "grown_mib": (most[0] - before_bytes) / _MIB}
    say(json.dumps(told))


def _measured(directory: Path, cache: Path | None, workers: int = 0) -> dict[str, float]:
    options = [] if cache is None else ["--cache", str(cache), "--workers", str(workers)]
    command = [sys.executable, "-m", "benchmarks.tokenize", "--child", str(directory), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _child(arguments.child, arguments.cache, arguments.workers)
        return
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        _write_tokenizer(directory / "tokenizer")
        _write_chats(directory / "chats.jsonl", arguments.rows)
        size_mib = (directory / "chats.jsonl").stat().st_size / _MIB
        found = {"text, into memory": _measured(directory, None)}
        for workers in (0, 1, 2):
            cache = directory / f"cache-{workers}"
            found[f"text, into files, {workers} workers"] = _measured(directory, cache, workers)
        found["from files"] = _measured(directory, directory / "cache-0")
        files_mib = sum(path.stat().st_size for path in (directory / "cache-0").rglob("*.bin")) / _MIB
    say(f"{arguments.rows:,} chats, {size_mib:.1f} MiB of JSONL, {files_mib:.1f} MiB of files")
    say()
    rows = [
        (how, f"{told['seconds']:.2f}", f"{told['rows'] / told['seconds']:,.0f}", f"{told['grown_mib']:.0f}")
        for how, told in found.items()
    ]
    table(("start", "seconds", "rows/s", "memory of its own, MiB"), rows)
    finish("tokenize", {"rows": arguments.rows, "jsonl_mib": size_mib, "files_mib": files_mib, "ways": found})


if __name__ == "__main__":
    main()
