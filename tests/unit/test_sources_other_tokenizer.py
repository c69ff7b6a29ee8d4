"""Chats under two tokenizers: which loss tokens of the student's have a row of the teacher's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdmesh.alignment.token_bytes import token_bytes
from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import ConfigError, DataError, InvalidRequest
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.sides import (
    Aligned,
    InChunks,
    Prompt,
    aligned_rows,
    answered_rows,
    first_rows,
    teacher_side,
)
from kdmesh_trainer.data.encoding.tokenizer import load_fast_tokenizer
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.data.kept.stored import measured
from kdmesh_trainer.fit import refuse_unlike
from tests.support.other_tokenizers import save_sentence_piece
from tests.support.tiny_models import save_tokenizer
from tests.support.trained_tokenizers import tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    directory = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(directory / "student")
    save_sentence_piece(directory / "teacher")
    return load_fast_tokenizer(directory / "student"), load_fast_tokenizer(directory / "teacher", whose="teacher")


@pytest.fixture(scope="module")
def encoder(tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]) -> OtherTokenizerEncoder:
    student, teacher = tokenizers
    return OtherTokenizerEncoder(student, teacher)


@pytest.fixture(scope="module")
def chunk_encoder(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> OtherTokenizerEncoder:
    student, teacher = tokenizers
    return OtherTokenizerEncoder(student, teacher, takes_chunks=True)


def templated(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def chat(*turns: str) -> Chat:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[n % 2], content=text) for n, text in enumerate(turns))
    return Chat(messages=messages, origin="a test")


TURNS = (
    "wrap the text", "The text is wrapped at width 70.\n\nNaïve façade: 日本語 🎉!",
    "and this?", "    def wrap(self, text):\n        return self._wrap_chunks(text)",
)  # fmt: skip


def only(found: list[list[TokenSequence] | Unusable]) -> Aligned:
    (sequences,) = found
    assert not isinstance(sequences, Unusable), sequences
    (sequence,) = sequences
    assert isinstance(sequence, Aligned)
    return sequence


def test_a_row_has_an_answer_where_both_predict_the_same_bytes_or_the_end_of_the_turn(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], encoder: OtherTokenizerEncoder
) -> None:
    sequence = only(encoder.encode([chat(*TURNS)]))
    student, teacher = (token_bytes(tokenizer) for tokenizer in tokenizers)
    own, theirs = sequence.labels[sequence.rows_A], sequence.teacher.labels
    pieces = [(student[one], teacher[other]) for one, other in zip(own.tolist(), theirs.tolist(), strict=True)]
    assert all(one == other for one, other in pieces)
    assert pieces.count((None, None)) == 2  # both turns end alike
    assert len(pieces) > 0.5 * sequence.num_rows
    known = dict(zip(encoder.shared.student_ids.tolist(), encoder.shared.teacher_ids.tolist(), strict=True))
    assert all(one in known for one in own.tolist())


def test_every_turn_is_matched_with_its_own_turn(encoder: OtherTokenizerEncoder) -> None:
    sequence = only(encoder.encode([chat("ask", "text", "ask", "text text text", "ask", "width")]))
    gaps = np.flatnonzero(np.diff(sequence.positions) > 1) + 1
    turns = np.searchsorted(gaps, sequence.rows_A, side="right")
    their_gaps = np.flatnonzero(np.diff(sequence.teacher.positions) > 8)
    assert set(turns.tolist()) == {0, 1, 2}
    assert len(their_gaps) <= 2


def test_a_template_that_changes_the_text_costs_the_tokens_that_it_changes(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], encoder: OtherTokenizerEncoder
) -> None:
    student, teacher = tokenizers
    assert isinstance(teacher.chat_template, str)
    shouting = teacher.chat_template.replace("{{ m.content }}</s>", "{{ m.content | replace('then', 'when') }}</s>")
    changed = OtherTokenizerEncoder(student, templated(teacher, shouting))
    text = "the text is wrapped at width 70 and then the text is wrapped again"
    plain, other = (len(only(each.encode([chat("ask", text)])).rows_A) for each in (encoder, changed))
    assert 0.4 * plain < other < plain


def test_turns_that_carry_no_loss_are_matched_with_nothing(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], encoder: OtherTokenizerEncoder
) -> None:
    student, teacher = tokenizers
    whole, last = chat(*TURNS), chat(*TURNS)
    turns = [number for number, message in enumerate(last.messages) if message.role == "assistant"]
    marked = replace(
        last,
        messages=tuple(
            replace(message, is_trained=number == turns[-1]) for number, message in enumerate(last.messages)
        ),
    )
    found = only(encoder.encode([marked]))
    other = only(OtherTokenizerEncoder(student, teacher, only_last=True).encode([whole]))
    assert found.labels.tolist() == other.labels.tolist()
    assert found.rows_A.tolist() == other.rows_A.tolist()
    assert student.decode(found.labels) == TURNS[turns[-1]] + str(student.eos_token)


def test_of_templates_that_differ_the_last_turn_that_carries_loss_is_matched(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    student, teacher = tokenizers
    forgetful = templated(
        teacher,
        "{% for m in messages %}[{{ m.role }}]{{ m.content if m.role == 'user' or loop.last else '' }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    words = ["why?", "because of it", "how?", "by hand", "when?", "a mistake"]
    said = chat(*words)
    marked = replace(said, messages=(*said.messages[:-1], replace(said.messages[-1], is_trained=False)))
    found = only(OtherTokenizerEncoder(student, forgetful).encode([marked]))
    assert student.decode(found.labels) == "by hand" + str(student.eos_token)
    assert teacher.decode(teacher_side([found])[0].token_ids).count("mistake") == 0


def test_a_chat_without_a_token_in_common_is_unusable(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
) -> None:
    student, teacher = tokenizers
    assert isinstance(teacher.chat_template, str)
    silent = teacher.chat_template.replace("{{ m.content }}</s>", "{{ m.content | length }}.</s>")
    (found,) = OtherTokenizerEncoder(student, templated(teacher, silent)).encode([chat("ask", "text")])
    assert isinstance(found, Unusable)


def test_a_sequence_that_is_cut_keeps_the_answers_of_what_is_left(encoder: OtherTokenizerEncoder) -> None:
    sequence = only(encoder.encode([chat(*TURNS)]))
    for count in range(1, sequence.num_rows + 1):
        shorter = first_rows(sequence, count)
        kept = sequence.rows_A[sequence.rows_A < count]
        if len(kept) == 0:
            assert shorter is None
            continue
        assert isinstance(shorter, Aligned)
        assert shorter.num_rows == count
        assert np.array_equal(shorter.rows_A, kept)
        assert np.array_equal(shorter.teacher.labels, sequence.teacher.labels[: len(kept)])


def test_rows_of_several_sequences_are_counted_through(encoder: OtherTokenizerEncoder) -> None:
    one, two = only(encoder.encode([chat("ask", "text")])), only(encoder.encode([chat(*TURNS)]))
    rows = answered_rows([one, two])
    assert rows is not None
    assert rows.tolist() == [*one.rows_A.tolist(), *(two.rows_A + one.num_rows).tolist()]
    assert [s.num_rows for s in teacher_side([one, two])] == [len(one.rows_A), len(two.rows_A)]
    plain = TokenSequence(token_ids=one.token_ids, positions=one.positions)
    assert answered_rows([plain]) is None


def test_answers_that_do_not_go_with_rows_are_refused(encoder: OtherTokenizerEncoder) -> None:
    sequence = only(encoder.encode([chat(*TURNS)]))
    for rows in (sequence.rows_A[:-1], sequence.rows_A[::-1], sequence.rows_A + sequence.num_rows, sequence.rows_A[:0]):
        with pytest.raises(InvalidRequest, match="do not answer"):
            Aligned(token_ids=sequence.token_ids, positions=sequence.positions, teacher=sequence.teacher, rows_A=rows)


def test_tokenizers_with_too_little_in_common_are_refused(encoder: OtherTokenizerEncoder) -> None:
    sequence = only(encoder.encode([chat(*TURNS)]))
    facts = measured([sequence])
    assert (facts.aligned_rows, facts.rows) == (len(sequence.rows_A), sequence.num_rows)
    aligned = facts.aligned_rows / facts.rows
    refuse_unlike(aligned, encoder.teacher_tokens(), at_least=aligned)
    with pytest.raises(DataError, match=r"min_aligned is 0.99: these tokenizers have too little in common"):
        refuse_unlike(aligned, encoder.teacher_tokens(), at_least=0.99)


def test_a_word_piece_tokenizer_is_refused(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    student, _ = tokenizers
    backend = Tokenizer(models.WordPiece({"<unk>": 0, "x": 1, "y": 2, "##y": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    teacher = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="the teacher's tokenizer is a WordPiece one"):
        OtherTokenizerEncoder(student, teacher)


def in_chunks(found: list[list[TokenSequence] | Unusable]) -> InChunks:
    (sequences,) = found
    assert not isinstance(sequences, Unusable), sequences
    (sequence,) = sequences
    assert isinstance(sequence, InChunks)
    return sequence


def pieces(
    sequence: InChunks, tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
) -> list[list[bytes]]:
    """Of each chunk, on both sides; b"" for what ends a turn."""
    tables = [token_bytes(tokenizer) for tokenizer in tokenizers]
    chunks = sequence.chunks
    sides = (
        (sequence.labels, chunks.student_begins, chunks.student_ends),
        (sequence.teacher.labels, chunks.teacher_begins, chunks.teacher_ends),
    )
    return [
        [
            b"".join(table[token] or b"" for token in labels[begin:end].tolist())
            for begin, end in zip(begins, ends, strict=True)
        ]
        for table, (labels, begins, ends) in zip(tables, sides, strict=True)
    ]


def test_chunks_are_the_same_bytes_on_both_sides_and_nearly_everything_is_in_one(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder
) -> None:
    sequence = in_chunks(chunk_encoder.encode([chat(*TURNS)]))
    own, theirs = pieces(sequence, tokenizers)
    assert own == theirs
    assert own.count(b"") == 2  # both turns end alike
    assert b"".join(own).decode() == TURNS[1] + TURNS[3]
    assert aligned_rows(sequence) == sequence.num_rows
    several = (sequence.chunks.student_ends - sequence.chunks.student_begins > 1).sum()
    assert several > 0
    plain = only(chunk_encoder.of_single_tokens().encode([chat(*TURNS)]))
    assert aligned_rows(plain) < sequence.num_rows


def test_a_sequence_that_is_cut_keeps_the_chunks_that_are_whole(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder
) -> None:
    sequence = in_chunks(chunk_encoder.encode([chat(*TURNS)]))
    whole, _ = pieces(sequence, tokenizers)
    for count in range(1, sequence.num_rows + 1):
        shorter = first_rows(sequence, count)
        kept = int((sequence.chunks.student_ends <= count).sum())
        if kept == 0:
            assert shorter is None
            continue
        assert isinstance(shorter, InChunks)
        own, theirs = pieces(shorter, tokenizers)
        assert own == theirs == whole[:kept]
        assert shorter.num_rows == count
        assert shorter.teacher.num_rows == shorter.chunks.teacher_ends[-1]


def test_chunks_that_are_not_runs_of_rows_are_refused(chunk_encoder: OtherTokenizerEncoder) -> None:
    sequence = in_chunks(chunk_encoder.encode([chat(*TURNS)]))
    with pytest.raises(InvalidRequest, match="not runs of the teacher's"):
        replace(sequence, chunks=sequence.chunks.shifted(0, 1))
    with pytest.raises(InvalidRequest, match="not runs of the student's"):
        replace(sequence, chunks=sequence.chunks.shifted(-1, 0))


def response(encoder: OtherTokenizerEncoder, ids: list[int], **limits: int) -> Aligned | InChunks:
    (prompt,) = encoder.encode_prompts([chat("wrap the text", "an answer that is left out")])
    assert isinstance(prompt, Prompt)
    own = TokenSequence(
        token_ids=np.concatenate([prompt.token_ids, np.asarray(ids, np.int32)]),
        positions=np.arange(len(prompt.token_ids) - 1, len(prompt.token_ids) + len(ids) - 1, dtype=np.int32),
    )
    found = encoder.read_response(prompt, own, **{"max_tokens": 10_000, "max_rows": 10_000, **limits})
    assert np.array_equal(found.token_ids, own.token_ids)
    assert np.array_equal(found.positions, own.positions)
    return found


def test_a_sampled_response_is_read_as_the_data_would_be(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    encoder: OtherTokenizerEncoder,
    chunk_encoder: OtherTokenizerEncoder,
) -> None:
    data = chat("wrap the text", TURNS[1])
    sampled = in_chunks(chunk_encoder.encode([data])).labels.tolist()
    read, expected = response(chunk_encoder, sampled), in_chunks(chunk_encoder.encode([data]))
    assert isinstance(read, InChunks)
    assert np.array_equal(read.teacher.token_ids, expected.teacher.token_ids)
    assert np.array_equal(read.teacher.positions, expected.teacher.positions)
    assert pieces(read, tokenizers) == pieces(expected, tokenizers)
    single = response(encoder, sampled)
    assert isinstance(single, Aligned)
    assert np.array_equal(single.rows_A, only(encoder.encode([data])).rows_A)


def test_ids_that_no_tokenizer_would_make_are_matched_by_their_bytes(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder
) -> None:
    student, _ = tokenizers
    letters = [student.encode(letter, add_special_tokens=False)[0] for letter in "the text"]
    read = response(chunk_encoder, letters)  # cut off: nothing ends it
    assert isinstance(read, InChunks)
    own, theirs = pieces(read, tokenizers)
    assert own == theirs
    assert b"".join(own) == b"the text"
    assert aligned_rows(read) == len(letters)


def test_a_response_of_nothing_that_can_be_matched_is_still_a_sample(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast],
    encoder: OtherTokenizerEncoder,
    chunk_encoder: OtherTokenizerEncoder,
) -> None:
    student, _ = tokenizers
    table = token_bytes(student)
    lone = next(token for token, piece in enumerate(table) if piece == b"\xf0")
    special = [token for token, piece in enumerate(table) if piece is None and token != encoder.end_of_turn()]
    for ids in ([lone], special[:1], special[:1] * 3):
        read = response(chunk_encoder, ids)
        assert isinstance(read, InChunks)
        assert len(read.chunks.student_begins) == 0
        assert read.teacher.num_rows == 1
        single = response(encoder, ids)
        assert isinstance(single, Aligned)
        assert single.rows_A.tolist() == [0]


def test_bytes_that_are_no_text_are_left_out_and_what_is_around_them_is_matched(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder
) -> None:
    student, _ = tokenizers
    table = token_bytes(student)
    first, second, third = (
        next(token for token, piece in enumerate(table) if piece == wanted) for wanted in (b"\xf0", b"\x9f", b"\x8e")
    )
    emoji = student.encode("🎉", add_special_tokens=False)
    text = student.encode("the text", add_special_tokens=False)
    ids = [first, *text, second, third, *emoji, *text, first, second]
    read = response(chunk_encoder, ids)
    assert isinstance(read, InChunks)
    own, theirs = pieces(read, tokenizers)
    assert own == theirs
    assert b"".join(own).decode() == "the text🎉the text"
    assert aligned_rows(read) == 2 * len(text) + len(emoji)


@pytest.mark.parametrize("junk", ["special", "no UTF-8"])
def test_a_word_with_something_else_inside_is_not_matched_with_the_word(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder, junk: str
) -> None:
    student, _ = tokenizers
    table = token_bytes(student)
    inside = next(
        token
        for token, piece in enumerate(table)
        if (piece is None if junk == "special" else piece == b"\xff") and token != chunk_encoder.end_of_turn()
    )
    letters = [student.encode(letter, add_special_tokens=False)[0] for letter in "the text is"]
    whole = response(chunk_encoder, letters)
    assert isinstance(whole, InChunks)
    begin, end = next(
        (int(begin), int(end))
        for begin, end in zip(whole.chunks.student_begins, whole.chunks.student_ends, strict=True)
        if end - begin > 2
    )
    read = response(chunk_encoder, [*letters[: begin + 1], *[inside] * 3, *letters[begin + 1 :]])
    assert isinstance(read, InChunks)
    own, theirs = pieces(read, tokenizers)
    assert own == theirs
    assert aligned_rows(read) == len(letters) - (end - begin)
    assert begin not in read.chunks.student_begins


def test_a_token_that_ends_in_half_a_character_is_not_matched_by_its_other_half() -> None:
    student, teacher = copy.deepcopy(tokenizer("byte_level_small")), copy.deepcopy(tokenizer("byte_level"))
    student.chat_template = teacher.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    half = next(token for token, piece in enumerate(token_bytes(student)) if piece == "aä".encode()[:2])
    text = student.encode("The ", add_special_tokens=False)
    read = response(OtherTokenizerEncoder(student, teacher, takes_chunks=True), [*text, half, *text])
    assert isinstance(read, InChunks)
    own, theirs = pieces(read, (student, teacher))
    assert own == theirs


def test_an_end_at_once_ends_the_turn_on_both_sides(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], chunk_encoder: OtherTokenizerEncoder
) -> None:
    end = chunk_encoder.end_of_turn()
    assert end is not None
    read = response(chunk_encoder, [end])
    assert isinstance(read, InChunks)
    assert aligned_rows(read) == 1
    assert read.teacher.labels.tolist() == [tokenizers[1].eos_token_id]


def test_what_the_teacher_cannot_take_is_not_matched(chunk_encoder: OtherTokenizerEncoder) -> None:
    sampled = in_chunks(chunk_encoder.encode([chat("wrap the text", TURNS[1])])).labels.tolist()
    whole = response(chunk_encoder, sampled)
    for limit in ({"max_tokens": whole.teacher.num_tokens - 5}, {"max_rows": whole.teacher.num_rows - 5}):
        cut = response(chunk_encoder, sampled, **limit)
        assert aligned_rows(cut) < aligned_rows(whole)
        assert cut.teacher.num_tokens <= limit.get("max_tokens", 10_000)
        assert cut.teacher.num_rows <= limit.get("max_rows", 10_000)


def test_the_part_of_a_text_that_would_be_compared_is_known(
    encoder: OtherTokenizerEncoder, chunk_encoder: OtherTokenizerEncoder
) -> None:
    texts = [TURNS[1], TURNS[3], ""]
    assert chunk_encoder.aligned_fraction(texts) == 1
    assert 0.3 < encoder.aligned_fraction(texts) < 1
    assert encoder.aligned_fraction([]) == 0
