"""Says how much samples count: by their text, by whether they were cut, and by the row that they answer."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from numbers import Real
from typing import assert_never

from kdmesh.chats.chat_rows import Chat, columns_found
from kdmesh.errors import ConfigError, DataError
from kdmesh.extension import resolve
from kdmesh.types import FinishReason, Int32Array, Sample
from kdmesh_trainer.data.encoding.chat import without_answers
from kdmesh_trainer.data.encoding.sides import Prompt, Question
from kdmesh_trainer.data.prompts import QuestionOf
from kdmesh_trainer.questions.matchers import build_matcher, refuse_unfit_answers
from kdmesh_trainer.questions.reader import answers_in
from kdmesh_trainer.sections.judge_config import CustomJudge, FinishedJudge, JudgeConfig, MatchJudge
from kdmesh_trainer.sections.questions_config import CustomMatch
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sources.rollouts import Episode, Verdict, spans_of

# (a response's text, whether it was cut, what it answers, which is None where nobody asks for it) -> what is thought
# of it. Of an episode, the response is its last turn, which answers all that came before. Only one with code of the
# user's raises.
Opinion = Callable[[str, bool, Question | None], Verdict]


class Judge:
    """Judges samples as they come, one after the other in a thread of its own, which ends with it."""

    def __init__(self, opinion: Opinion, decode: Callable[[Int32Array], str]) -> None:
        """`decode` turns a response's ids into its text, without what ends it."""
        self._opinion = opinion
        self._decode = decode
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")

    def submit(self, prompt: Prompt, sample: Sample, then: Callable[[Verdict], None]) -> Future[Verdict]:
        """The verdict on a sample, when it is there and `then` has been called with it. Any thread; does not block.

        Those that were submitted before are there by then.
        """

        def judge() -> Verdict:
            verdict = self._verdict(prompt, sample)
            then(verdict)
            return verdict

        return self._thread.submit(judge)

    def _verdict(self, prompt: Prompt, sample: Sample) -> Verdict:
        is_cut_off = sample.finish_reason is FinishReason.LENGTH
        first, end = spans_of(sample)[-1]
        question = prompt.question
        if isinstance(sample, Episode) and question is not None:
            question = replace(question, chat=replace(question.chat, messages=sample.messages[:-1]))
        try:
            return self._opinion(self._decode(sample.token_ids[first:end]), is_cut_off, question)
        except BaseException as failure:  # noqa: BLE001 - code of the user's own, sys.exit() too; whoever trains is told
            return Verdict(weight=0, error=f"{type(failure).__name__}: {failure}")


def resolve_judge(cfg: JudgeConfig, *, of_episodes: bool = False) -> Opinion:
    """What the judge that `cfg` names thinks. Raises ConfigError when one of the user's cannot be found or called.

    Args:
        of_episodes: one of the user's is told all messages of each.
    """
    match cfg:
        case FinishedJudge():
            return lambda text, is_cut_off, question: Verdict(weight=cfg.cut if is_cut_off else 1.0)
        case MatchJudge():
            return _by_match(cfg)
        case CustomJudge():
            return _custom(cfg, of_episodes=of_episodes)
        case _:
            assert_never(cfg)


def kept_of_rows(source: OnPolicy) -> QuestionOf | None:
    """What is kept of each row for judge and environment, from chats that have their rows; None: nothing is."""
    judged_by = None if source.judge is None else question_of(source.judge)
    if source.environment is None:
        return judged_by

    def kept(chat: Chat) -> Question:
        asked = Question(chat=_asked(chat), answers=(), row=_row(chat))
        return asked if judged_by is None else replace(asked, answers=judged_by(chat).answers)

    return kept


def question_of(cfg: JudgeConfig) -> QuestionOf | None:
    """What is kept of each row for the judge, from chats that have their rows; None: it wants nothing of them."""
    match cfg:
        case FinishedJudge():
            return None
        case MatchJudge():
            return lambda chat: _with_answers(cfg, chat)
        case CustomJudge():
            return lambda chat: Question(chat=_asked(chat), answers=(), row=_row(chat))
        case _:
            assert_never(cfg)


def digest_questions(prompts: Sequence[Prompt]) -> str:
    """Of all that responses to them are judged by; empty: of nothing."""
    if prompts[0].question is None:
        return ""
    state = hashlib.blake2b()
    for prompt in prompts:
        assert prompt.question is not None
        told = [prompt.question.answers, prompt.question.row]
        state.update(json.dumps(told, sort_keys=True, default=repr).encode() + b"\n")
    return state.hexdigest()


def _by_match(cfg: MatchJudge) -> Opinion:
    matcher = build_matcher(cfg.match, key="source.judge.match")

    def opinion(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
        assert question is not None
        is_right = matcher(text, question)
        weight = cfg.right if is_right else cfg.wrong
        return Verdict(weight=cfg.cut if is_cut_off and cfg.cut is not None else weight, is_right=is_right)

    return opinion


def _custom(cfg: CustomJudge, *, of_episodes: bool) -> Opinion:
    try:
        function = resolve(cfg.target, cfg.params, num_arguments=cfg.num_arguments(of_episodes=of_episodes))
    except ConfigError as error:
        raise ConfigError(f"source.judge: {error}") from None

    def opinion(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
        assert question is not None
        asked = [message.for_template() for message in question.chat.messages]
        told = ([*asked, {"role": "assistant", "content": text}],) if of_episodes else ()
        weight = function(text, copy.deepcopy(dict(question.row)), is_cut_off, *told)
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"{cfg.target} returned {weight!r}; a weight must be a number")
        if not 0 <= float(weight) < math.inf:
            raise ValueError(f"{cfg.target} returned {weight!r}; a weight must be finite and not negative")
        return Verdict(weight=float(weight))

    return opinion


def _with_answers(cfg: MatchJudge, chat: Chat) -> Question:
    asked, row = _asked(chat), _row(chat)
    if cfg.answer is None:
        if len(asked.messages) == len(chat.messages):
            raise DataError(
                f"{chat.origin}: source.judge.answer is null, and this does not end with a turn of the assistant, "
                "which is then the answer"
            )
        answers = answers_in(chat.messages[-1].content, f"{chat.origin}: the last turn")
    elif row.get(cfg.answer) is None:
        raise DataError(
            f"{chat.origin}: no column {cfg.answer!r}, which source.judge.answer names; columns found: "
            f"{columns_found(row)}"
        )
    else:
        answers = answers_in(row[cfg.answer], f"{chat.origin}: {cfg.answer}")
    # Of a row that nobody is shown nothing else is kept.
    question = Question(chat=asked, answers=answers, row=row if isinstance(cfg.match, CustomMatch) else {})
    refuse_unfit_answers(cfg.match, [question])
    return question


def _asked(chat: Chat) -> Chat:
    return replace(chat, messages=without_answers(chat.messages), row=None)


def _row(chat: Chat) -> dict[str, object]:
    assert chat.row is not None
    return dict(chat.row)
