"""Several processes and one token cache: workers, two jobs at once, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdmesh.errors import DataError
from kdmesh_trainer.data.files import pieces
from kdmesh_trainer.data.files.piece import Piece
from kdmesh_trainer.data.kept import token_cache, tokenising
from kdmesh_trainer.sections.data_config import DataConfig
from tests.support.chat_tokenizers import chat_tokenizer
from tests.support.token_caches import SMALL_PIECES_BYTES, entries, files_of, make_cache, octets
from tests.support.trainer_jobs import write_chats


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    chat_tokenizer("chatml").save_pretrained(path)
    return path


def data_of(path: Path, *, workers: int = 0, cache: str = "cache", count: int = 60) -> DataConfig:
    file = path / "a.jsonl"
    if not file.exists():
        write_chats(file, count, seed=1)
    return DataConfig.model_validate(
        {
            "train": {"format": "chat", "path": str(file)},
            "max_tokens": 96,
            "token_cache": {"directory": str(path / cache), "workers": workers},
        }
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES_BYTES)


@contextlib.contextmanager
def making(student: Path, data: DataConfig, **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that makes the sequences of `data`."""
    told = {"student": str(student), "data": data.model_dump(mode="json"), "has_small_pieces": True, **arguments}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.token_caches", json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_paused(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "paused\n", process.communicate()


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate("go on\n", timeout=100)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def refuse_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Iterator[None]:
        raise AssertionError("another process has made it")

    monkeypatch.setattr(token_cache, "tokenised", refuse)


def test_of_two_that_start_together_one_makes_it_and_the_other_waits(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path)
    refuse_tokenising(monkeypatch)
    found = []
    with making(student, data, pause_at=2) as process:
        until_paused(process)
        cache, _ = make_cache(student, data)
        waiting = threading.Thread(target=lambda: found.append(cache.sequences("train", files_of(data))))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        made = result(process)
        waiting.join(60)
    assert (len(found[0]), found[0].facts.digest) == (60, made["digest"])
    assert made["sequences"] == 60
    assert len(entries(tmp_path / "cache")) == 1


def test_what_was_killed_in_the_middle_is_made_from_the_start(tmp_path: Path, student: Path) -> None:
    data, whole = data_of(tmp_path), data_of(tmp_path, cache="whole")
    with making(student, data, pause_at=2) as process:
        until_paused(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.suffix for path in entries(tmp_path / "cache")] == [".writing"]
    expected = make_cache(student, whole)[0].sequences("train", files_of(whole))
    found = make_cache(student, data)[0].sequences("train", files_of(data))
    assert found.facts == expected.facts
    [entry], [other] = entries(tmp_path / "cache"), entries(tmp_path / "whole")
    assert octets(entry) == octets(other)


@pytest.mark.usefixtures("small_pieces")
def test_workers_change_no_byte(tmp_path: Path, student: Path) -> None:
    made, before = [], _children()
    for workers in (0, 2):
        data = data_of(tmp_path, workers=workers, cache=f"cache-{workers}")
        make_cache(student, data)[0].sequences("train", files_of(data))
        [entry] = entries(tmp_path / f"cache-{workers}")
        made.append((entry.name, octets(entry)))
    assert made[0] == made[1]
    assert _children() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
def test_any_number_of_workers_changes_no_byte(tmp_path: Path, student: Path) -> None:
    made = []
    for workers in (1, 3):
        data = data_of(tmp_path, workers=workers, cache=f"cache-{workers}")
        make_cache(student, data)[0].sequences("train", files_of(data))
        [entry] = entries(tmp_path / f"cache-{workers}")
        made.append(octets(entry))
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
def test_the_first_bad_row_is_named_whoever_found_it(tmp_path: Path, student: Path) -> None:
    data, before = data_of(tmp_path, workers=2), _children()
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[20] = "{"
    lines[50] = "[]"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:21: not JSON: "):
        make_cache(student, data)[0].sequences("train", files_of(data))
    assert entries(tmp_path / "cache") == []
    assert _children() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
def test_a_worker_that_dies_ends_it_with_a_sentence(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = data_of(tmp_path, workers=2), _children()
    taken = tokenising._Worker.taken

    def killing(worker: tokenising._Worker, piece: Piece) -> tokenising.Taken:
        found = taken(worker, piece)
        for child in _children():
            if child not in before:
                os.kill(child.pid, signal.SIGKILL)
        return found

    monkeypatch.setattr(tokenising._Worker, "taken", killing)
    sentence = r"a\.jsonl: a process that tokenised it was ended by SIGKILL, perhaps because there was no memory left"
    with pytest.raises(DataError, match=sentence):
        make_cache(student, data)[0].sequences("train", files_of(data))
    assert entries(tmp_path / "cache") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_no_process(tmp_path: Path, student: Path, number: signal.Signals) -> None:
    data = data_of(tmp_path, workers=2)
    with making(student, data, pause_at=2) as process:
        until_paused(process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(number)
        process.wait(60)
        gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (len(children), [])
    left = [path.suffix for path in entries(tmp_path / "cache")]
    assert left == ([] if number is signal.SIGINT else [".writing"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dataset_takes_no_memory_of_its_size(tmp_path: Path, student: Path) -> None:
    answer = "It was so, and it was so again, as everybody says who was there. " * 120
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(13_000):
            messages = [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    size_bytes = (tmp_path / "a.jsonl").stat().st_size
    assert size_bytes > 100e6
    data = data_of(tmp_path, workers=1)
    for _ in ("made", "found"):
        with making(student, data, has_small_pieces=False) as process:
            output, errors = process.communicate(timeout=800)
        assert process.returncode == 0, errors
        told = json.loads(output.splitlines()[-1])
        assert told["sequences"] == 13_000
        assert told["grown_bytes"] < 40e6


def _children() -> list[psutil.Process]:
    """Processes that tokenise; Python's own watcher of shared memory stays."""
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]
