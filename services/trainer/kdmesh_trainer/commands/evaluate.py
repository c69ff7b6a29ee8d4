"""The command line of `kdmesh evaluate`: python -m kdmesh_trainer.commands.evaluate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdmesh.interrupt import quiet_interrupt

with quiet_interrupt():
    from kdmesh import log
    from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
    from kdmesh.config import config_parser, load
    from kdmesh.counting import counted, told
    from kdmesh.errors import ConfigError, KdmeshError
    from kdmesh.outputs import make_writable, refuse_own_input, refuse_to_replace, say, tell
    from kdmesh_trainer.commands.running import run
    from kdmesh_trainer.config import TrainerConfig
    from kdmesh_trainer.sections.source_config import OnPolicy

if TYPE_CHECKING:
    from kdmesh.openai.servers import ChatServers
    from kdmesh_trainer.data.encoding.sides import Question
    from kdmesh_trainer.questions.scores import Answered, AnswerScores

_NO_QUESTIONS = "evaluation.questions is not set, so there is nothing to ask"


def main() -> int:
    """Ask and grade. Returns 0, or see `run`."""
    return run(_parser(), _print_scores)


def _print_scores(cfg: TrainerConfig, arguments: argparse.Namespace) -> int:
    log.configure("evaluate")
    if arguments.output is not None:
        make_writable(arguments.output)
        refuse_own_input(arguments.output, _inputs(cfg))
        refuse_to_replace(arguments.output, is_wanted=arguments.overwrite)
    answers = _Answers(arguments.output)
    with answers.told_if_it_ends_early():
        if arguments.openai is None:
            scores = _evaluate(cfg, answers)
        else:
            scores = _ask_endpoint(cfg, _endpoint(arguments), answers)
        say(f"{scores.sentence()}\n{json.dumps(scores.figures())}\n")
        answers.write()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("kdmesh_trainer.commands.evaluate", "Ask a served model a run's questions.")
    parser.add_argument("--output", type=Path, help="JSONL to write: what was answered to each question")
    parser.add_argument("--openai", action="append", help="URL of a server with OpenAI's chat completions")
    parser.add_argument("--model-name", help="the model to ask for, as the servers of --openai call it")
    parser.add_argument("--concurrency", type=int, help="requests at a time, of --openai")
    parser.add_argument("--timeout", type=float, help="seconds for a request, of --openai")
    parser.add_argument("--request-field", action="append", default=[], help="NAME=VALUE of a request, of --openai")
    parser.add_argument("--access", type=Path, help="YAML file with token_file and tls, of --openai")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output, if it is there")
    return parser


def _inputs(cfg: TrainerConfig) -> dict[str, Path]:
    questions = cfg.evaluation.questions
    return {} if questions is None else {"evaluation.questions.path": questions.path}


class _Answers:
    """What was answered to each question: beside its file while questions are asked, then in it."""

    def __init__(self, path: Path | None) -> None:
        """`path`: where they go; None: nowhere."""
        from kdmesh_trainer.questions.answer_files import EarlyAnswers

        self._path = path
        self._early = None if path is None else EarlyAnswers(path.with_name(f"{path.name}.incomplete"))
        self._questions: Sequence[Question] = ()
        self._answered: Sequence[Answered] = ()

    def keep(self, done: int, questions: Sequence[Question], answered: Sequence[Answered]) -> None:
        """Take all of them."""
        self._questions, self._answered = questions, answered

    def take(self, question: Question, answered: Answered) -> None:
        """Take those to one question. Raises CheckpointError when they cannot be written."""
        if self._early is not None:
            self._early.add(question, answered)

    def write(self) -> None:
        """Raises CheckpointError."""
        from kdmesh_trainer.questions.answer_files import write_answers

        if self._path is not None and self._early is not None:
            write_answers(self._path, self._questions, self._answered)
            self._early.remove()

    @contextmanager
    def told_if_it_ends_early(self) -> Iterator[None]:
        """Inside, a person is told what is there when an error, Ctrl-C or a stdout that is full ends it."""
        try:
            yield
        except (KdmeshError, KeyboardInterrupt, OSError):
            if self._early is not None and (number := self._early.number):
                tell(f"The questions with all their answers, {number} of them, are in {self._early.path}")
            raise


def _evaluate(cfg: TrainerConfig, answers: _Answers) -> AnswerScores:
    # Not at the top: a bad configuration must not wait for torch.
    from kdmesh.tokens import tokenizer_fingerprint
    from kdmesh_trainer.builders.evaluation import check_answerer, read_questions_of
    from kdmesh_trainer.builders.rollouts import open_pool
    from kdmesh_trainer.builders.vision import load_reader
    from kdmesh_trainer.data.encoding.templated import student_tokenizer
    from kdmesh_trainer.data.encoding.tokenizer import vocabulary_size
    from kdmesh_trainer.devices import OwnDevices
    from kdmesh_trainer.mesh import joined
    from kdmesh_trainer.questions.examiner import Examiner, ServedWeights

    tokenizer = student_tokenizer(cfg.student.model, cfg.data)
    reader = load_reader(cfg)
    exam = read_questions_of(cfg, tokenizer, reader)
    if exam is None:
        raise ConfigError(_NO_QUESTIONS)
    is_sampled = isinstance(cfg.source, OnPolicy)
    rollouts = cfg.source.rollouts if isinstance(cfg.source, OnPolicy) else cfg.evaluation.rollouts
    assert rollouts is not None  # the configuration's
    key = "source.rollouts" if is_sampled else "evaluation.rollouts"
    with (
        open_pool(key, rollouts, job=cfg.job_name) as pool,
        joined("cpu", longest_wait_s=rollouts.deadline_s) as mesh,
    ):
        check_answerer(
            exam,
            pool,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer.get_vocab()),
            vocabulary_size=vocabulary_size(tokenizer),
            reader=reader,
        )
        examiner = Examiner(
            exam, pool, ServedWeights(), keep=answers.keep, mesh=mesh, devices=OwnDevices(), take=answers.take
        )
        return examiner.examine(done=0)


def _endpoint(arguments: argparse.Namespace) -> ChatServers:
    from kdmesh.openai.servers import ChatServers

    return ChatServers.of_options(
        urls=arguments.openai,
        model=arguments.model_name,
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout,
        request_fields=arguments.request_field,
        access=OPEN_ACCESS if arguments.access is None else load(AccessConfig, arguments.access),
    )


def _ask_endpoint(cfg: TrainerConfig, servers: ChatServers, answers: _Answers) -> AnswerScores:
    from kdmesh_trainer.questions.endpoint import EndpointExaminer

    if cfg.evaluation.questions is None:
        raise ConfigError(_NO_QUESTIONS)
    examiner = EndpointExaminer(cfg.evaluation.questions, cfg.data, servers)
    with counted("answers", elsewhere=told("answers")) as show:
        return examiner.examine(show, keep=answers.keep, take=answers.take)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the trainer does: gloo's threads must not meet an interpreter that goes down
