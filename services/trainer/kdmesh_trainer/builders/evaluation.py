"""Builds what judges the student: on held-out data, and by questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from transformers import PreTrainedTokenizerFast

from kdmesh.chats.chat_rows import TEXT_ALONE
from kdmesh.chats.image_files import ImageColumn
from kdmesh.models.images.reader import ImageReader
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.types import TokenSequence
from kdmesh_trainer.builders.rollouts import Rollouts
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.builders.vision import expansion_of
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.images import dataset_images
from kdmesh_trainer.data.kept.stored import sequence_facts
from kdmesh_trainer.data.prompts import digest_prompts
from kdmesh_trainer.devices import OwnDevices, ScoringEvaluator
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.fit import check_sampler, check_sampler_images
from kdmesh_trainer.loop import Evaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.questions.answer_files import AnswerFiles
from kdmesh_trainer.questions.exam import Exam, read_exam
from kdmesh_trainer.questions.examiner import Examiner, StudentWeights
from kdmesh_trainer.sources.batches import Source
from kdmesh_trainer.sources.on_policy import OnPolicySource
from kdmesh_trainer.student.model import Student


def build_evaluator(
    cfg: TrainerConfig,
    student: Student,
    held_out: Mapping[str, Sequence[TokenSequence]],
    teachers: Teachers | None,
    source: Source,
    mesh: Mesh,
) -> Evaluator | None:
    """On held-out data, as Data has it; on devices that it may have to wait for. None: there is none."""
    if not held_out:
        return None
    evaluator = HeldOutEvaluator(
        student,
        [sequence for sequences in held_out.values() for sequence in sequences],
        parts={name: len(sequences) for name, sequences in held_out.items() if name},
        outage=None if teachers is None else teachers.outage,
        teacher=None if teachers is None else teachers.final_rows,
        teacher_head=None if teachers is None else teachers.heads,
        max_tokens=cfg.batch.max_tokens,
        prefetch=0 if teachers is None else teachers.prefetch,
        mesh=mesh,
    )
    return ScoringEvaluator(evaluator, source.devices) if isinstance(source, OnPolicySource) else evaluator


def digest_of_judge(
    cfg: TrainerConfig,
    held_out: Mapping[str, Sequence[TokenSequence]],
    teachers: Teachers | None,
    exam: Exam | None,
) -> str:
    """Of all that the figure of `export.best` depends on beside the student."""
    judge: dict[str, object]
    if cfg.export.best == "accuracy":
        assert exam is not None and cfg.evaluation.questions is not None  # the configuration's
        prompts = digest_prompts(exam.prompts).hex()
        rules = cfg.evaluation.questions.model_dump(mode="json", exclude={"path"})
        judge = {"prompts": prompts, "answers": [question.answers for question in exam.questions], "rules": rules}
    else:
        data = {name: asdict(sequence_facts(sequences)) for name, sequences in held_out.items()}
        judge = {"held_out": data, "teachers": {} if teachers is None else teachers.identity()}
    return hashlib.blake2b(json.dumps(judge, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_questions_of(
    cfg: TrainerConfig, tokenizer: PreTrainedTokenizerFast, reader: ImageReader | None
) -> Exam | None:
    """What the student will be asked at every evaluation; None: nothing. Loads no model.

    Args:
        tokenizer: with the chat template that is trained with.
        reader: of the student's images; None where it reads text alone.

    Raises:
        ConfigError: a grader cannot be found or called.
        DataError: a question cannot be used.
    """
    asked = cfg.evaluation.questions
    if asked is None:
        return None
    images = TEXT_ALONE
    if reader is not None:
        images = ImageColumn(source=dataset_images(cfg.data.images, asked.path.parent), name=cfg.data.images.column)
    encoder = ChatEncoder(tokenizer, images=reader)
    return read_exam(asked, model=cfg.student.model, tokenizer=tokenizer, encoder=encoder, images=images)


def build_examiner(
    cfg: TrainerConfig,
    exam: Exam | None,
    rollouts: Rollouts | None,
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int,
    reader: ImageReader | None,
    source: Source,
    mesh: Mesh,
) -> Examiner | None:
    """Who asks the exam's questions; None: there is none. Collective.

    Args:
        tokenizer_fingerprint: of the student's tokenizer.
        vocabulary_size: its real tokens.

    Raises:
        ModelMismatch: a rollout server has another tokenizer.
        DataError: a rollout server would cut what the configuration allows.
    """
    if exam is None:
        return None
    assert rollouts is not None  # the configuration's
    check_answerer(
        exam,
        rollouts.pool,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocabulary_size=vocabulary_size,
        reader=reader,
    )
    is_sampled = isinstance(source, OnPolicySource)
    if not is_sampled:
        mesh.on_first(rollouts.pool.wake)  # a job that was killed may have left a server asleep
    return Examiner(
        exam,
        rollouts.pool,
        StudentWeights(rollouts.publisher, rollouts.pool, are_published=is_sampled),
        keep=AnswerFiles(cfg.output / "answers").keep,
        mesh=mesh,
        devices=source.devices if isinstance(source, OnPolicySource) else OwnDevices(),
    )


def check_answerer(
    exam: Exam, pool: RolloutPool, *, tokenizer_fingerprint: str, vocabulary_size: int, reader: ImageReader | None
) -> None:
    """Return when the rollout servers can answer every question. Raises as `build_examiner`."""
    server = pool.describe()
    check_sampler(
        server,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocabulary_size=vocabulary_size,
        max_tokens=exam.max_tokens,
        keys="evaluation.questions.sampling.max_new_tokens",
    )
    images = [placed for prompt in exam.prompts for placed in prompt.images]
    check_sampler_images("evaluation.questions", images, server, image_expansion=expansion_of(reader))
