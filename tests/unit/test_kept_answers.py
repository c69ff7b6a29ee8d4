"""The answers of a dataset that is being written outlive the process that asked for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdmesh.answering.answer_report import Counts
from kdmesh.answering.kept_answers import kept_answers
from kdmesh.errors import ConfigError, DataError


def test_answers_are_gone_on_with_and_become_the_dataset(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "a.jsonl"
    with pytest.raises(RuntimeError), kept_answers(output) as kept:
        kept.resume({"seed": 0})
        kept.add(2, [{"n": 1}, {"n": "\u2028ü"}], Counts())
        kept.add(0, [], Counts(cut_off=2, blank=1, prompt_tokens=7))
        raise RuntimeError
    part = output.with_name("a.jsonl.part")
    with part.open("ab") as file:
        file.write(b'{"prompt": 1, "rows": [{"n": 3}], "cou')
    with kept_answers(output) as kept:
        kept.resume({"seed": 0})
        assert (kept.prompts, kept.written, kept.counts) == (2, 2, Counts(cut_off=2, blank=1, prompt_tokens=7))
        assert [number for number in range(4) if number not in kept] == [1, 3]
        kept.add(1, [{"n": 4}], Counts(cut_off=1))
        kept.add(3, [{"n": 5}], Counts())
        kept.publish(output)
    assert [json.loads(line)["n"] for line in output.read_text().split("\n")[:-1]] == [4, 1, "\u2028ü", 5]
    assert list(output.parent.iterdir()) == [output]


def test_half_a_surrogate_pair_is_kept_as_the_prompt_has_it(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "ü", "name": "\ud83d"}]}]
    with pytest.raises(RuntimeError), kept_answers(tmp_path / "a.jsonl") as kept:
        kept.resume({"seed": 0})
        kept.add(0, rows, Counts())
        raise RuntimeError
    with kept_answers(tmp_path / "a.jsonl") as kept:
        kept.resume({"seed": 0})
        assert (kept.written, kept.damaged) == (1, 0)
        kept.publish(tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("written", "damaged"),
    [
        (b'{"n": 1}', b'{"n": 1'),
        (b'"prompt"', b'"psompt"'),
        (b'"blank"', b'"bland"'),
        (b'{"n": 1}', b"[]"),
        (b'{"n": 1}', b'{"n": "\xff"}'),
        (b'"rows": [', b'"rows": {"'),
        (b'{"n": 1}', b'{"n": 7}'),
        (b'[{"n": 1}]', b"[]"),
        (b'"cut_off": 0', b'"cut_off": 4'),
        (b'"prompt": 1', b'"prompt": 7'),
        (b'"digest"', b'"digesu"'),
        (b'"digest": "', b'"digest": "f'),
        (b'{"n": 1}', b'{"n": ' + b"[" * 100_000 + b"1}"),
    ],
)
def test_a_damaged_line_costs_its_own_prompt_and_no_other(tmp_path: Path, written: bytes, damaged: bytes) -> None:
    output = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError), kept_answers(output) as kept:
        kept.resume({"seed": 0})
        for number in range(3):
            kept.add(number, [{"n": number}], Counts())
        raise RuntimeError
    part = tmp_path / "a.jsonl.part"
    lines = part.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(written, damaged)
    part.write_bytes(b"".join(lines))
    with kept_answers(output) as kept:
        kept.resume({"seed": 0})
        assert (kept.prompts, kept.written, kept.damaged) == (2, 2, 1)
        assert [number for number in range(3) if number not in kept] == [1]
        kept.add(1, [{"n": 4}], Counts())
        kept.publish(output)
    assert [json.loads(line)["n"] for line in output.read_text().splitlines()] == [0, 4, 2]


def test_an_answer_without_a_digest_is_damaged(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    kept_lines = ({"seed": 0}, {"prompt": 1, "rows": [{"n": 1}], "counts": {"cut_off": 2}})
    (tmp_path / "a.jsonl.part").write_text("".join(json.dumps(line) + "\n" for line in kept_lines))
    with kept_answers(output) as kept:
        kept.resume({"seed": 0})
        assert (kept.prompts, kept.damaged, kept.counts.cut_off) == (0, 1, 0)


def test_answers_that_are_damaged_after_they_were_counted_are_not_published(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part"
    with (
        pytest.raises(DataError, match=r"answers to prompt 3 .* damaged since the start"),
        kept_answers(output) as kept,
    ):
        kept.resume({"seed": 0})
        for number in range(5):
            kept.add(number, [{"n": number}], Counts())
        part.write_bytes(part.read_bytes().replace(b'{"n": 3}', b'{"n": 8}'))
        kept.publish(output)
    assert list(tmp_path.iterdir()) == [part]
    with kept_answers(output) as kept:
        kept.resume({"seed": 0})
        assert [number for number in range(5) if number not in kept] == [3]


def test_answers_to_something_else_are_neither_gone_on_with_nor_lost(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with kept_answers(output) as kept:
        kept.resume({"seed": 0, "samples": 1})
        kept.add(0, [{"n": 1}], Counts())
    part = tmp_path / "a.jsonl.part"
    before = part.read_bytes()
    other = r"a\.jsonl\.part holds answers to something else \(seed differ\)"
    with pytest.raises(ConfigError, match=other), kept_answers(output) as kept:
        kept.resume({"seed": 1, "samples": 1})
    assert part.read_bytes() == before
    with pytest.raises(RuntimeError), kept_answers(output):
        raise RuntimeError  # before it was asked whose they are
    assert part.read_bytes() == before
    part.write_text('{"messages": []}\n[]\n')
    with pytest.raises(ConfigError, match="seed, messages differ"), kept_answers(output) as kept:
        kept.resume({"seed": 1})
    part.write_text("oops\n")
    with pytest.raises(ConfigError, match="in no form that is known"), kept_answers(output) as kept:
        kept.resume({"seed": 1})
    assert part.exists()


def test_two_processes_never_write_the_same_answers(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with kept_answers(output), pytest.raises(ConfigError, match="another process is writing"), kept_answers(output):
        pass


def test_what_holds_no_answer_does_not_stay(tmp_path: Path) -> None:
    with kept_answers(tmp_path / "a.jsonl") as kept:
        kept.resume({"seed": 0})
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"), kept_answers(tmp_path / "file" / "a.jsonl"):
        pass
