"""Questions as a model is asked them, and what says whether it answers right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kdmesh.chats.image_files import ImageColumn
from kdmesh.errors import DataError
from kdmesh.models.ends import stop_token_ids
from kdmesh.sampling.seeds import seed_of
from kdmesh.sampling.stops import before_stop
from kdmesh.types import Int32Array, Sampling
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.data.encoding.turns import Unusable
from kdmesh_trainer.questions.grading import read_graded
from kdmesh_trainer.questions.matchers import Matcher
from kdmesh_trainer.sections.questions_config import QuestionsConfig
from kdmesh_trainer.sources.order import StepPrompt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """What is asked at every evaluation, always the same."""

    questions: Sequence[Question]  # at least one
    prompts: Sequence[StepPrompt]  # of each question, with the seed of its first sample
    sampling: Sampling
    samples: int  # of each question
    ks: tuple[int, ...]  # of pass@k
    is_right: Matcher
    decode: Callable[[Int32Array], str]  # a response's ids to its text, without what ends it

    @property
    def max_tokens(self) -> int:
        """Of the longest prompt with the longest response."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + self.sampling.max_new_tokens


def read_exam(
    cfg: QuestionsConfig,
    *,
    model: Path,
    tokenizer: PreTrainedTokenizerFast,
    encoder: ChatEncoder,
    images: ImageColumn,
) -> Exam:
    """The exam that `cfg` describes. Loads no model, and asks no server.

    Args:
        model: directory of the student.
        tokenizer: the student's.
        encoder: of the student's chats, with `tokenizer`.
        images: where those of the questions are found.

    Raises:
        ConfigError: a grader cannot be found or called.
        DataError: a question cannot be used; none is ever left out.
    """
    questions, is_right = read_graded(cfg, images)
    prompts = _prompts(questions, encoder, cfg.seed)
    ends = stop_token_ids(model, tokenizer, encoder)
    log.info("questions read", extra={"questions": len(questions), "samples_of_each": cfg.samples})
    return Exam(
        questions=questions,
        prompts=prompts,
        sampling=Sampling(**cfg.sampling.model_dump(), stop_token_ids=ends),
        samples=cfg.samples,
        ks=tuple(sorted(cfg.pass_at)),
        is_right=is_right,
        decode=partial(response_text, tokenizer, ends=ends, stop_strings=cfg.sampling.stop_strings),
    )


def response_text(
    tokenizer: PreTrainedTokenizerFast, token_ids: Int32Array, *, ends: Sequence[int], stop_strings: Sequence[str]
) -> str:
    """What a response says, without special tokens and without what ended it: one of `ends`, or of the texts."""
    ids = token_ids.tolist()
    kept = ids[:-1] if ids[-1] in ends else ids
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return before_stop(text, stop_strings)


def _prompts(questions: Sequence[Question], encoder: ChatEncoder, seed: int) -> list[StepPrompt]:
    prompts = []
    encoded = encoder.encode_prompts([question.chat for question in questions])
    for number, (question, prompt) in enumerate(zip(questions, encoded, strict=True)):
        if isinstance(prompt, Unusable):
            raise DataError(f"{question.chat.origin}: {prompt.reason} ({prompt.detail})")
        prompts.append(
            StepPrompt(token_ids=prompt.token_ids, images=prompt.images, seed=seed_of("question", seed, number))
        )
    return prompts
