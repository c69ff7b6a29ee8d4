"""Token caches over small files of chats, in this process and in others.

`python -m tests.support.token_caches ARGUMENTS_JSON` makes the sequences of a file, waits in the middle where it is
told to, and prints what it found.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdmesh.chats.chat_rows import NO_COLUMNS, TeacherColumns
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.recipe import Encoder, EncoderRecipe
from kdmesh_trainer.data.files import pieces
from kdmesh_trainer.data.files.piece import Piece
from kdmesh_trainer.data.files.readers import ChatFiles, open_files
from kdmesh_trainer.data.kept import token_cache
from kdmesh_trainer.data.kept.token_cache import TokenCache
from kdmesh_trainer.data.kept.tokenising import Taken, Work, tokenised
from kdmesh_trainer.sections.data_config import ChatFile, DataConfig

SMALL_PIECES_BYTES = 2000


def make_cache(student: Path, data: DataConfig, *, takes_chunks: bool = False) -> tuple[TokenCache, Encoder]:
    """The cache that `data` describes, as a job of this student has it, and its encoder."""
    assert data.token_cache is not None
    recipe = EncoderRecipe(student=student, data=data, takes_chunks=takes_chunks)
    tokenizer = recipe.tokenizer()
    encoder = recipe.encoder(tokenizer)
    return TokenCache(data.token_cache, recipe, encoder, recipe.ingredients(tokenizer)), encoder


def files_of(data: DataConfig, teacher: TeacherColumns = NO_COLUMNS) -> ChatFiles:
    """Those that are trained on."""
    assert isinstance(data.train, ChatFile)
    return open_files(data.train, teacher=teacher)


def entries(directory: Path) -> list[Path]:
    """What was made in a cache's directory, or was begun."""
    return sorted(path for path in directory.iterdir() if path.is_dir() and path.name != "files")


def octets(entry: Path) -> dict[str, bytes]:
    """Every file of an entry."""
    return {path.name: path.read_bytes() for path in sorted(entry.iterdir())}


def plain(sequence: TokenSequence) -> Any:
    """All that a sequence says, as plain values."""
    own = {"ids": sequence.token_ids.tolist(), "positions": sequence.positions.tolist(), "kind": type(sequence)}
    teacher = getattr(sequence, "teacher", None)
    chunks = getattr(sequence, "chunks", None)
    return {
        **own,
        "name": getattr(sequence, "teacher_name", None),
        "rows": None if not hasattr(sequence, "rows_A") else sequence.rows_A.tolist(),
        "chunks": None
        if chunks is None
        else [
            getattr(chunks, f"{side}_{edge}").tolist() for side in ("student", "teacher") for edge in ("begins", "ends")
        ],
        "teacher": None if teacher is None else plain(teacher),
    }


def anonymous_bytes() -> int:
    """What this process holds of memory that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Run in a process of its own."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    pause_at = arguments.get("pause_at")
    if arguments.get("has_small_pieces"):
        pieces.PIECE_BYTES = SMALL_PIECES_BYTES
    data = DataConfig.model_validate(arguments["data"])
    most_bytes = 0

    def watched(work: Work, encoder: Encoder, *, workers: int) -> Iterator[tuple[Piece, Taken]]:
        nonlocal most_bytes
        for number, each in enumerate(tokenised(work, encoder, workers=workers)):
            if number == pause_at:
                sys.stdout.write("paused\n")
                sys.stdout.flush()
                sys.stdin.readline()
            most_bytes = max(most_bytes, anonymous_bytes())
            yield each

    token_cache.tokenised = watched  # type: ignore[attr-defined]
    cache, _ = make_cache(Path(arguments["student"]), data)
    before_bytes = anonymous_bytes()
    found = cache.sequences("train", files_of(data))
    most_bytes = max(most_bytes, anonymous_bytes())
    said = {
        "sequences": len(found),
        "digest": found.facts.digest,
        "grown_bytes": max(0, most_bytes - before_bytes),
        "threads": threading.active_count(),
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
