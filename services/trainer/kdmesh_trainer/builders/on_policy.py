"""Builds what only an on-policy run has: prompts, rollout servers, and the source that uses both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from kdmesh.errors import DataError
from kdmesh.models.ends import stop_token_ids
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.types import Int32Array, PlacedImage, Sampling, TokenSequence
from kdmesh_trainer.builders.rollouts import Rollouts
from kdmesh_trainer.builders.teacher import Teacher
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.blend import blend_identity, digest_key, parts_of
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.recipe import Encoder
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens
from kdmesh_trainer.data.kept.stored import PromptFacts, Stored, images_of, prompt_facts, sequence_facts
from kdmesh_trainer.data.prompts import PromptPolicy
from kdmesh_trainer.data.training_data import TrainingData
from kdmesh_trainer.devices import Devices, OwnDevices, SharedDevices
from kdmesh_trainer.fit import (
    check_aligned,
    check_images,
    check_sampler,
    check_sampler_images,
    check_samples,
    refuse_unlike,
)
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.exam import response_text
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sources.context_rows import ContextRows
from kdmesh_trainer.sources.early_rows import EarlyRows, EarlyService
from kdmesh_trainer.sources.environment import Environment
from kdmesh_trainer.sources.episodes import Episodes
from kdmesh_trainer.sources.judge import Judge, Opinion, digest_questions, kept_of_rows
from kdmesh_trainer.sources.on_policy import OnPolicySource
from kdmesh_trainer.sources.order import AnswerOrder, PromptOrder
from kdmesh_trainer.sources.panel import EarlyPanel
from kdmesh_trainer.sources.sampler import ReadResponse, Sampler
from kdmesh_trainer.sources.show import Showcase
from kdmesh_trainer.student.model import Student

_MAY_CHANGE: dict[str, Any] = {
    **dict.fromkeys(("rollouts", "too_long", "colocated", "early_rows_mib", "overlap_tokens", "show_every"), True),
    "environment": {"deadline_s", "max_calls"},
}
"""Keys of `source` in which a run that goes on may differ."""

_JUDGED_PROMPTS = 1000  # enough to know how much two tokenizers have in common


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is sampled, checked against everything but servers."""

    source: OnPolicy
    prompts: Sequence[Prompt]
    facts: Mapping[str, PromptFacts]  # of each dataset of them, by name
    sampling: Sampling
    max_tokens: int  # of the longest prompt with the longest response, or episode
    answers: Sequence[TokenSequence]  # the data's own; empty where all is sampled
    tokenizer: PreTrainedTokenizerFast
    other_tokenizer: OtherTokenizerEncoder | None  # the teacher's; None: it has the student's
    judge: Judge | None  # None: all samples count alike
    environment: Environment | None  # None: nobody answers samples

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerFast:
        """The student's, unless the teacher has another."""
        return self.tokenizer if self.other_tokenizer is None else self.other_tokenizer.teacher_tokenizer

    def identity(self) -> dict[str, str]:
        """What a checkpoint can only be continued with, by configuration key."""
        told = self.source.model_dump(mode="json", exclude=_MAY_CHANGE)
        identity = {**blend_identity(self.prompts), "source": json.dumps(told, sort_keys=True)}
        identity |= {digest_key("data.train", name): facts.digest for name, facts in self.facts.items()}
        kept = {name: digest_questions(part) for name, part in parts_of(self.prompts).items()}
        whose = "judge" if self.environment is None else "environment"
        identity |= {digest_key(f"source.{whose}'s rows", name): digest for name, digest in kept.items() if digest}
        if not self.answers:
            return identity
        for name, answers in parts_of(self.answers).items():
            facts = sequence_facts(answers)
            identity[digest_key("data.train's answers", name)] = f"{facts.digest} {facts.teacher_digest}"
            if facts.weights:
                identity[digest_key("data.weight_column", name)] = facts.weights
        return identity


def read_task(
    cfg: TrainerConfig,
    source: OnPolicy,
    *,
    data: TrainingData,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    tokens: TeacherTokens,
    opinion: Opinion | None,
    environment: Environment | None,
) -> Task:
    """Read the prompts, and the answers that are learnt from beside samples.

    Args:
        opinion: of the judge of `source`; None: it has none.
        environment: that of `source`; None: it has none.

    Raises:
        DataError: the data cannot be used, or the teacher's tokenizer has too little in common.
    """
    drawn = source.sampling
    prompts = data.prompts(prompt_policy(cfg, source), kept_of_rows(source))
    if source.environment is not None and any(images_of(prompts)):
        raise DataError("source.environment does not go with images, and data.train has some")
    facts = {name: prompt_facts(part) for name, part in parts_of(prompts).items()}
    if isinstance(encoder, OtherTokenizerEncoder):
        _refuse_unlike_prompts(cfg, prompts, encoder, tokens)
    sampling = Sampling(**drawn.model_dump(), stop_token_ids=stop_token_ids(cfg.student.model, tokenizer, encoder))
    answers: Sequence[TokenSequence] = ()
    if source.sampled_fraction < 1:
        answers = data.sequences()
        if cfg.data.teacher_tokenizer is not None:
            check_aligned(answers, tokens, at_least=cfg.data.teacher_tokenizer.min_aligned)
    return Task(
        source=source,
        prompts=prompts,
        facts=facts,
        sampling=sampling,
        max_tokens=_most(cfg, source, prompt_tokens=max(each.longest for each in facts.values()))[0],
        answers=answers,
        tokenizer=tokenizer,
        other_tokenizer=encoder if isinstance(encoder, OtherTokenizerEncoder) else None,
        judge=None if opinion is None else Judge(opinion, _decoder(tokenizer, sampling)),
        environment=environment,
    )


def check_task(cfg: TrainerConfig, task: Task, teachers: Teachers) -> None:
    """Return when the teachers take every response to their prompts, and the data's own answers.

    Raises:
        DataError: one does not.
        ModelMismatch: its image processor makes other numbers of tokens.
    """
    for name, teacher in teachers.by_name.items():
        longest_read = max(each.longest_read.get(asked, 0) for each in task.facts.values() for asked in {"", name})
        images = list(_images_read(task.prompts, name))
        tokens, rows = _most(cfg, task.source, prompt_tokens=longest_read)
        teacher.pool.require(Needs.of(tokens=tokens, rows=rows, images=images))
        check_samples(tokens=tokens, rows=rows, teacher=teacher.pool.describe())
        check_images("train", images, teacher.pool.describe(), image_expansion=teachers.image_expansion)
    if task.answers:
        teachers.check_requests("train", task.answers)


def _most(cfg: TrainerConfig, source: OnPolicy, *, prompt_tokens: int) -> tuple[int, int]:
    """Most tokens, and most loss tokens, of what a prompt of so many tokens may become."""
    drawn, environment = source.sampling.max_new_tokens, source.environment
    if environment is None:
        return prompt_tokens + drawn, drawn
    return cfg.data.max_tokens, min(cfg.data.max_tokens, environment.max_turns * drawn)


def _decoder(tokenizer: PreTrainedTokenizerFast, sampling: Sampling) -> Callable[[Int32Array], str]:
    return partial(response_text, tokenizer, ends=sampling.stop_token_ids, stop_strings=sampling.stop_strings)


def prompt_policy(cfg: TrainerConfig, source: OnPolicy) -> PromptPolicy:
    """What becomes of rows that give no prompt, or too long a one."""
    most = cfg.data.max_tokens - source.sampling.max_new_tokens
    return PromptPolicy(max_tokens=most, too_long=source.too_long, unusable=cfg.data.unusable)


def _images_read(prompts: Sequence[Prompt], name: str) -> Iterator[PlacedImage]:
    """All that teacher `name` is shown."""
    for part in parts_of(prompts).values():
        for prompt in () if isinstance(part, Stored) else part:
            if prompt.teacher_name in ("", name):
                yield from prompt.images if prompt.teacher_ids is None else prompt.teacher_images


def _refuse_unlike_prompts(
    cfg: TrainerConfig, prompts: Sequence[Prompt], encoder: OtherTokenizerEncoder, tokens: TeacherTokens
) -> None:
    """Raises DataError when the tokenizers have too little in common, in what the prompts say."""
    assert cfg.data.teacher_tokenizer is not None  # of whom the encoder is
    aligned = encoder.aligned_fraction(
        [message.content for prompt in prompts[:_JUDGED_PROMPTS] if prompt.chat for message in prompt.chat.messages]
    )
    refuse_unlike(aligned, tokens, at_least=cfg.data.teacher_tokenizer.min_aligned)


def _reader_of_responses(encoder: OtherTokenizerEncoder, teacher: Teacher) -> ReadResponse:
    """What turns responses into as much as `teacher` takes of what its tokenizer has for them."""
    model = teacher.pool.describe()
    most_tokens, most_rows = min(model.max_sequence_tokens, model.max_request_tokens), model.max_request_rows
    teacher.pool.require(Needs.of(tokens=most_tokens, rows=most_rows))
    return partial(encoder.read_response, max_tokens=most_tokens, max_rows=most_rows)


def build_source(
    cfg: TrainerConfig,
    task: Task,
    *,
    steps: int,
    student: Student,
    tokenizer_fingerprint: str,
    teachers: Teachers,
    rollouts: Rollouts,
    mesh: Mesh,
    stack: ExitStack,
) -> OnPolicySource:
    """The source, closed with `stack`. Collective.

    Args:
        steps: of the whole run.
        student: sharded; its vocabulary is what it shares with the teacher.
        tokenizer_fingerprint: of the student's tokenizer.
        rollouts: those of the task's source.

    Raises:
        ModelMismatch: a server has another tokenizer.
        DataError: a server would cut what the configuration allows.
    """
    source = task.source
    pool, server = rollouts.pool, rollouts.pool.describe()
    check_sampler(
        server,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocabulary_size=student.vocabulary_size,
        max_tokens=task.max_tokens,
    )
    images = list(images_of(task.prompts))
    check_sampler_images("train", images, server, image_expansion=teachers.image_expansion)
    devices: Devices = OwnDevices()
    if source.colocated:
        devices = SharedDevices(pool, teachers.only.pool, mesh)
        stack.callback(devices.close)
    else:
        mesh.on_first(pool.wake)  # a job that was killed may have left a server asleep
    built = OnPolicySource(
        _sampler(cfg, task, pool, teachers, mesh, stack),
        rollouts.publisher,
        _early(cfg, source, teachers),
        max_staleness=source.max_staleness,
        max_tokens=cfg.batch.max_tokens,
        prefetch=teachers.prefetch,
        steps=steps,
        mesh=mesh,
        answers=_answers(cfg, task),
        teacher_update_every=cfg.teacher_update_every,
        devices=devices,
        showcase=_showcase(cfg, task) if mesh.is_first else None,
        context=ContextRows.of(mesh, teachers.heads.names),
    )
    stack.callback(built.close)
    return built


def _early(cfg: TrainerConfig, source: OnPolicy, teachers: Teachers) -> EarlyService:
    """Who is asked for rows as samples come; several teachers have equal parts of the memory for them."""

    def of_one(teacher: Teacher) -> EarlyRows:
        size_bytes = source.early_rows_mib * 2**20 // len(teachers.by_name)
        return EarlyRows(
            teacher.rows,
            most_rows=0 if source.colocated else size_bytes // teacher.pool.row_bytes(),
            is_frozen=cfg.teacher_update_every is None,
        )

    early = {name: of_one(teacher) for name, teacher in teachers.by_name.items()}
    return EarlyPanel(early, asks_all=cfg.data.teacher_column is None) if cfg.teachers else early[""]


def _sampler(
    cfg: TrainerConfig, task: Task, pool: RolloutPool, teachers: Teachers, mesh: Mesh, stack: ExitStack
) -> Sampler:
    each, other = task.source.samples_per_prompt, task.other_tokenizer
    return Sampler(
        PromptOrder(task.prompts, per_step=task.source.prompts_of(cfg.batch.sequences), seed=cfg.seed),
        pool,
        sampling=task.sampling,
        samples_per_prompt=each,
        rank=mesh.rank,
        ranks=mesh.world_size,
        read=None if other is None else _reader_of_responses(other, teachers.only),
        judge=task.judge,
        episodes=_episodes(cfg, task, pool, stack),
    )


def _episodes(cfg: TrainerConfig, task: Task, pool: RolloutPool, stack: ExitStack) -> Episodes | None:
    asked = task.source.environment
    if asked is None or task.environment is None:
        return None
    episodes = Episodes(
        pool,
        task.environment,
        max_tokens=cfg.data.max_tokens,
        deadline_s=asked.deadline_s,
        max_calls=asked.max_calls,
    )
    stack.callback(episodes.close)
    return episodes


def _answers(cfg: TrainerConfig, task: Task) -> AnswerOrder | None:
    if not task.answers:
        return None
    sampled = task.source.prompts_of(cfg.batch.sequences) * task.source.samples_per_prompt
    return AnswerOrder(task.answers, per_step=cfg.batch.sequences - sampled, seed=cfg.seed)


def _showcase(cfg: TrainerConfig, task: Task) -> Showcase | None:
    if task.source.show_every is None:
        return None
    return Showcase(
        cfg.output / "samples.jsonl",
        lambda ids: str(task.tokenizer.decode(ids)),
        decode_teacher=lambda ids: str(task.teacher_tokenizer.decode(ids)),
        every=task.source.show_every,
        samples_per_prompt=task.source.samples_per_prompt,
    )
