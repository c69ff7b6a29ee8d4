"""An exam is asked in groups, graded whatever the grader does, and asked again where servers lack the weights."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import CheckpointError, DeadlineExpired, ModelMismatch
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.devices import OwnDevices
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.answer_files import AnswerFiles, EarlyAnswers
from kdmesh_trainer.questions.exam import Exam
from kdmesh_trainer.questions.examiner import Examiner, ServedWeights, StudentWeights
from kdmesh_trainer.questions.scores import Answered
from kdmesh_trainer.sources.order import StepPrompt
from kdmesh_trainer.stop import StepLost, Stopping
from tests.support.full_disk import files_limited_to

LONGEST = 5
VERSION = 7


class Pending:
    """Samples that are here, or a refusal."""

    is_done = True

    def __init__(self, samples: list[Sample], refusal: str = "") -> None:
        self._samples = samples
        self._refusal = refusal

    def wait(self) -> list[Sample]:
        if self._refusal:
            raise ModelMismatch(self._refusal)
        return self._samples


class Server:
    """Answers with the prompt's first id, which for one question in three is another one with the second sample."""

    def __init__(self, *, refuses: int = 0, version: int = VERSION) -> None:
        self.refuses = refuses  # so many requests
        self.version = version
        self.seeds: list[int] = []
        self.noted: list[tuple[int, tuple[str, ...]]] = []
        self.most_under_way = 0
        self._under_way = 0

    def wait(self, pending: Iterable[object]) -> bool:
        """No server comes back."""
        self.most_under_way = max(self.most_under_way, self._under_way)
        self._under_way -= len(list(pending))
        return True

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        self.noted.append((version, tuple(behind)))

    def outdated(self) -> frozenset[str]:
        return frozenset()

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...],
        on_sample: Callable[[Sample], None],
    ) -> Pending:
        self._under_way += 1
        self.refuses -= 1
        if self.refuses >= 0:
            return Pending([], refusal=f"{min_weight_version} is wanted")
        self.seeds.append(seed)
        return Pending([self._sample(int(prompt_ids[0]), number) for number in range(num_samples)])

    def _sample(self, first: int, number: int) -> Sample:
        answer = first + (number == 1 and first % 3 == 0)
        ids = np.full(1 + first % LONGEST, answer, np.int32)
        return Sample(
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            finish_reason=FinishReason.LENGTH if len(ids) == LONGEST else FinishReason.STOP,
            min_weight_version=self.version,
            max_weight_version=self.version,
        )


class Weights:
    """What the examiner is told to ask for, and how often it was brought again."""

    def __init__(self) -> None:
        self.brought: list[int] = []
        self.again = 0

    def bring(self, *, done: int) -> int:
        self.brought.append(done)
        return VERSION

    def bring_again(self, among: Collection[str]) -> None:
        self.again += 1


def right(response: str, question: Question) -> bool:
    return response == question.answers[0]


def exam(count: int, *, samples: int = 2, is_right: Callable[[str, Question], bool] = right) -> Exam:
    return Exam(
        questions=[
            Question(
                chat=Chat(messages=(Message(role="user", content=f"{number}?"),), origin=f"questions.jsonl:{number}"),
                answers=(str(number),),
                row={},
            )
            for number in range(count)
        ],
        prompts=[StepPrompt(token_ids=np.array([number, 1], np.int32), seed=1000 * number) for number in range(count)],
        sampling=Sampling(max_new_tokens=LONGEST),
        samples=samples,
        ks=(1, 2),
        is_right=is_right,
        decode=lambda ids: str(ids[0]),
    )


def ask(mesh: Mesh, asked: Exam, server: Server, weights: Any = None) -> tuple[list[Answered], Any]:
    kept: list[Answered] = []

    def keep(done: int, questions: Sequence[Question], answered: Sequence[Answered]) -> None:
        assert (done, questions) == (4, asked.questions)
        kept.extend(answered)

    examiner = Examiner(asked, server, weights or Weights(), keep=keep, mesh=mesh, devices=OwnDevices())
    return kept, examiner.examine(done=4)


def test_every_question_is_asked_once_in_groups_of_which_two_are_under_way(mesh: Mesh) -> None:
    server = Server()
    kept, scores = ask(mesh, exam(300), server)
    assert sorted(server.seeds) == [1000 * number for number in range(300)]
    assert server.most_under_way == 2 * 64
    assert [each.number for each in kept] == list(range(300))
    assert scores.num_samples == 600
    assert scores.accuracy.mean == pytest.approx((200 + 100 / 2) / 300)
    assert scores.pass_at[2].mean == 1
    assert scores.cut_off_fraction == pytest.approx(1 / LONGEST)
    assert scores.response_tokens_mean == pytest.approx(3)


def test_a_grader_that_raises_makes_an_answer_wrong_and_is_told_once(
    mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    def picky(response: str, question: Question) -> bool:
        if question.answers[0] == "2":
            raise KeyError("unit")
        if question.answers[0] == "5":
            sys.exit("the end")
        return right(response, question)

    with caplog.at_level(logging.WARNING):
        kept, scores = ask(mesh, exam(9, is_right=picky), Server())
    assert scores.grader_errors == 4
    assert [each.num_right for each in kept] == [1, 2, 0, 1, 2, 0, 1, 2, 2]
    assert kept[2].responses[0].error == "KeyError: 'unit'"
    assert kept[5].responses[0].error == "SystemExit: the end"
    (told,) = [entry.__dict__ for entry in caplog.records]
    assert (told["responses"], told["question"], told["why"]) == (4, "questions.jsonl:2", "KeyError: 'unit'")


class StopAtThird:
    """A stop that is wanted when it is looked at for the third time."""

    def __init__(self) -> None:
        self._looks = 0

    def is_wanted(self) -> bool:
        self._looks += 1
        return self._looks == 3


def test_questions_end_between_groups_when_the_run_is_to_stop(mesh: Mesh) -> None:
    server, kept = Server(), []
    examiner = Examiner(
        exam(300), server, Weights(), keep=lambda *told: kept.append(told), mesh=mesh, devices=OwnDevices()
    )
    with pytest.raises(Stopping):
        examiner.examine(done=4, stop=StopAtThird())
    assert kept == []
    assert len(server.seeds) == 3 * 64  # two groups were answered, one was under way


def test_a_server_without_the_weights_gets_them_and_is_asked_again(mesh: Mesh) -> None:
    weights, server = Weights(), Server(refuses=5)
    kept, scores = ask(mesh, exam(150), server, weights)
    assert weights.again == 1
    assert weights.brought == [4]
    expected, undisturbed = ask(mesh, exam(150), Server())
    assert kept == expected
    assert scores == undisturbed


def test_a_server_that_never_has_the_weights_ends_the_run_with_the_reason(mesh: Mesh) -> None:
    with pytest.raises(ModelMismatch, match=f"although the servers got the weights again: {VERSION} is wanted"):
        ask(mesh, exam(3), Server(refuses=1000))
    with pytest.raises(ModelMismatch, match="refuses to sample from the weights that it serves"):
        ask(mesh, exam(3), Server(refuses=1000), ServedWeights())


class Queued:
    """Samples that come, or are too late."""

    def __init__(self, samples: list[Sample], on_sample: Callable[[Sample], None]) -> None:
        self.is_done = self.is_late = False
        self._samples = samples
        self._on_sample = on_sample

    def settle(self, *, is_late: bool) -> None:
        self.is_done, self.is_late = True, is_late
        for sample in () if is_late else self._samples:
            self._on_sample(sample)

    def wait(self) -> list[Sample]:
        assert self.is_done
        if self.is_late:
            raise DeadlineExpired("nothing came")
        return self._samples


class BusyServer(Server):
    """Answers so many requests, the first ones first, before the others are late; in all no more than `until`."""

    def __init__(self, *, together: int, until: int = 1000) -> None:
        super().__init__()
        self.rounds = 0
        self._together = together
        self._until = until

    def submit(self, *arguments: Any, **named: Any) -> Any:
        return Queued(super().submit(*arguments, **named).wait(), named["on_sample"])

    def wait(self, pending: Iterable[Any]) -> bool:
        self.rounds += 1
        for place, one in enumerate([one for one in pending if not one.is_done]):
            is_late = place >= self._together or self._until == 0
            self._until -= not is_late
            one.settle(is_late=is_late)
        return True


def test_a_server_that_is_slow_and_steady_is_asked_again_for_what_is_late(mesh: Mesh) -> None:
    expected, undisturbed = ask(mesh, exam(150), Server())
    server = BusyServer(together=10)
    kept, scores = ask(mesh, exam(150), server)
    assert (kept, scores) == (expected, undisturbed)
    assert server.rounds == 7 + 7 + 3  # of groups of 64, 64 and 22


def test_a_server_that_answers_nothing_any_more_ends_the_run_with_the_reason(mesh: Mesh) -> None:
    for until, rounds in ((0, 1), (25, 4), (64, 7 + 2)):  # the second group was asked before the first was answered
        server = BusyServer(together=10, until=until)
        with pytest.raises(StepLost, match="nothing came"):
            ask(mesh, exam(150), server)
        assert server.rounds == rounds


def early(mesh: Mesh, asked: Exam, server: Server, *, ends: type[BaseException]) -> list[int]:
    """Numbers of the questions whose answers are taken before an evaluation ends early."""
    taken: list[int] = []

    def take(question: Question, answered: Answered) -> None:
        assert question == asked.questions[answered.number]
        assert len(answered.responses) == asked.samples
        taken.append(answered.number)

    def keep(*told: object) -> None:
        raise AssertionError("it is no whole evaluation")

    examiner = Examiner(asked, server, ServedWeights(), keep=keep, mesh=mesh, devices=OwnDevices(), take=take)
    with pytest.raises(ends):
        examiner.examine(done=4)
    return sorted(taken)


def test_what_came_before_the_servers_were_gone_is_taken(mesh: Mesh) -> None:
    for until in (0, 25, 64):
        assert early(mesh, exam(150), BusyServer(together=10, until=until), ends=StepLost) == list(range(until))


class Interrupted(BusyServer):
    """Ctrl-C comes when its samples are waited for so often."""

    def wait(self, pending: Iterable[Any]) -> bool:
        if self.rounds == 8:
            raise KeyboardInterrupt
        return super().wait(pending)


def test_what_came_before_a_person_ended_it_is_taken(mesh: Mesh) -> None:
    assert early(mesh, exam(150), Interrupted(together=10), ends=KeyboardInterrupt) == list(range(64 + 10))


def test_samples_that_nobody_asked_for_are_not_taken(mesh: Mesh) -> None:
    asked = replace(exam(150), sampling=Sampling(max_new_tokens=LONGEST - 1))  # one question in five has longer ones
    assert early(mesh, asked, Server(), ends=StepLost) == [i for i in range(128) if i % LONGEST < LONGEST - 1]


def test_an_answer_of_other_weights_is_not_taken_for_the_students(mesh: Mesh) -> None:
    with pytest.raises(ModelMismatch, match=f"of weight version 6; {VERSION} was asked for"):
        ask(mesh, exam(3), Server(version=6))
    _, scores = ask(mesh, exam(3), Server(version=6), ServedWeights())  # any will do
    assert scores.num_questions == 3


class Publisher:
    """A WeightPublisher that counts."""

    behind = frozenset({"away:1"})

    def __init__(self) -> None:
        self.published: list[int] = []
        self.caught_up = 0

    def publish(self, *, version: int) -> None:
        self.published.append(version)

    def catch_up(self, among: Collection[str]) -> None:
        self.caught_up += len(among)

    def weight_version(self, version: int) -> int:
        return 100 + version


def test_a_run_that_samples_has_published_its_student_and_another_does_it_for_the_questions() -> None:
    for are_published in (True, False):
        publisher, server = Publisher(), Server()
        weights = StudentWeights(publisher, server, are_published=are_published)
        assert weights.bring(done=3) == 103
        noted = (103, ("away:1",))
        assert publisher.published == ([] if are_published else [3])
        assert server.noted == ([] if are_published else [noted])
        weights.bring_again({"back:1"})
        assert publisher.caught_up == 1
        assert server.noted[-1] == noted


def test_what_was_answered_is_kept_by_steps_and_replaced_when_a_run_goes_back(mesh: Mesh, tmp_path: Path) -> None:
    asked = exam(3)
    kept, _ = ask(mesh, asked, Server())
    files = AnswerFiles(tmp_path / "answers")
    for done in (0, 10, 20):
        files.keep(done, asked.questions, kept)
    wrong = [replace(each, responses=each.responses[:1]) for each in kept]
    files.keep(10, asked.questions, wrong)  # continued from step 10 or earlier
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == [
        "step-00000000.jsonl",
        "step-00000010.jsonl",
    ]
    lines = [
        [json.loads(line) for line in (tmp_path / "answers" / name).read_text().splitlines()]
        for name in ("step-00000000.jsonl", "step-00000010.jsonl")
    ]
    assert [len(line["responses"]) for line in lines[0]] == [2, 2, 2]
    assert [len(line["responses"]) for line in lines[1]] == [1, 1, 1]
    assert lines[0][0] == {
        "question": "questions.jsonl:0",
        "asked": "0?",
        "answers": ["0"],
        "right": 1,
        "responses": [
            {"text": "0", "is_right": True, "is_cut_off": False, "tokens": 1},
            {"text": "1", "is_right": False, "is_cut_off": False, "tokens": 1},
        ],
    }


def test_half_a_surrogate_pair_in_what_a_grader_says_is_kept(mesh: Mesh, tmp_path: Path) -> None:
    asked = exam(1)
    [kept], _ = ask(mesh, asked, Server())
    failed = replace(kept, responses=(replace(kept.responses[0], error="ValueError: no \ud83d"),))
    AnswerFiles(tmp_path).keep(0, asked.questions, [failed])
    line = json.loads((tmp_path / "step-00000000.jsonl").read_text(encoding="utf-8"))
    assert line["responses"][0]["grader_error"] == "ValueError: no \ud83d"


def test_a_full_disk_leaves_the_answers_before_it(mesh: Mesh, tmp_path: Path) -> None:
    asked = exam(3)
    kept, _ = ask(mesh, asked, Server())
    early = EarlyAnswers(tmp_path / "answers.jsonl.incomplete")
    early.path.write_text("of an earlier command\n")
    early.add(asked.questions[0], kept[0])
    line = early.path.read_bytes()
    with (
        files_limited_to(len(line) + 20),
        pytest.raises(CheckpointError, match="incomplete cannot"),
    ):
        early.add(asked.questions[1], kept[1])
    assert (early.number, early.path.read_bytes()) == (1, line)
    early.add(asked.questions[2], kept[2])
    lines = early.path.read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == ["questions.jsonl:0", "questions.jsonl:2"]


def test_answers_that_cannot_be_written_are_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "answers").touch()
    with pytest.raises(CheckpointError, match=r"step-00000003\.jsonl cannot be written"):
        AnswerFiles(tmp_path / "answers").keep(3, [], [])
