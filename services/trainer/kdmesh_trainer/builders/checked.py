"""Checks all of a run that takes neither weights nor a service, before what takes long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedTokenizerFast

from kdmesh.chats.chat_rows import TeacherColumns
from kdmesh.errors import ConfigError
from kdmesh.losses import Divergence, SampledDivergence
from kdmesh.models.directory import check_model_directory
from kdmesh.models.images.reader import ImageReader
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh_trainer.algorithms.build import BuildAlgorithm, resolve_algorithm
from kdmesh_trainer.builders.context import refuse_unfit_student
from kdmesh_trainer.builders.evaluation import read_questions_of
from kdmesh_trainer.builders.layers import refuse_unknown_layers, refuse_unreached
from kdmesh_trainer.builders.objective import resolve_divergence
from kdmesh_trainer.builders.student import check_speed, check_spread
from kdmesh_trainer.builders.student_length import refuse_short_student
from kdmesh_trainer.builders.vision import expansion_of, load_reader, no_images
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.other_tokenizer import OtherTokenizerEncoder
from kdmesh_trainer.data.encoding.recipe import Encoder, EncoderRecipe
from kdmesh_trainer.data.encoding.tokenizer import TeacherTokens, vocabulary_size
from kdmesh_trainer.data.files.readers import Reader, open_dataset
from kdmesh_trainer.data.kept.token_cache import TokenCache
from kdmesh_trainer.data.training_data import TrainingData
from kdmesh_trainer.questions.exam import Exam
from kdmesh_trainer.sections.data_config import TeacherMessages
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sources.environment import Environment, resolve_environment
from kdmesh_trainer.sources.judge import Opinion, kept_of_rows, resolve_judge
from kdmesh_trainer.student.freezing import check_freeze
from kdmesh_trainer.student.lora import check_adapter
from kdmesh_trainer.student.rounded_modules import check_rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is found without a teacher, and without reading a dataset, but for questions, or a weight."""

    tokenizer: PreTrainedTokenizerFast  # with the chat template that is trained with
    tokenizer_fingerprint: str
    vocabulary_size: int  # real tokens of the student's tokenizer
    teacher_tokens: TeacherTokens
    encoder: Encoder
    judge_encoder: Encoder  # of held-out data
    image_reader: ImageReader | None  # None: the student reads text alone
    train: TrainingData
    held_out: Mapping[str, Reader]  # by name; that of the only one is empty; no entry: nothing is judged on data
    exam: Exam | None  # None: no questions are asked
    opinion: Opinion | None  # None: nobody judges samples
    environment: Environment | None  # None: nobody answers samples
    divergence: Divergence | SampledDivergence | None  # None: the objective has none
    build_algorithm: BuildAlgorithm | None  # None: the objective has none


def check(cfg: TrainerConfig) -> Checked:
    """Everything but services, and what is in weights. Raises ConfigError when a part of it cannot be used."""
    check_model_directory(cfg.student.model, needs_weights=cfg.student.weights == "pretrained")
    refuse_unfit_student(cfg)
    recipe = EncoderRecipe(
        student=cfg.student.model,
        data=cfg.data,
        takes_chunks=isinstance(cfg.objective, Distill) and cfg.objective.compares_chunks,
    )
    tokenizer = recipe.tokenizer()
    check_speed(cfg)
    reader = load_reader(cfg)
    refuse_short_student(cfg)
    refuse_unknown_layers(cfg)
    check_freeze(cfg.student.freeze, cfg.student.model)
    check_adapter(cfg.student.lora, cfg.student.model)
    check_rounding(
        cfg.student.quantization,
        cfg.student.model,
        getattr(torch, cfg.student.compute_dtype),
        written=cfg.export.dtype,
    )
    check_spread(cfg)
    refuse_unreached(cfg)
    encoder = recipe.encoder(tokenizer, reader)
    context = cfg.data.teacher_context
    columns = TeacherColumns(
        messages=context.column if isinstance(context, TeacherMessages) else None,
        name=cfg.data.teacher_column,
        known_names=tuple(cfg.teachers),
    )
    needs_boundaries = isinstance(cfg.objective, Distill) and cfg.objective.needs_boundaries
    read = partial(open_dataset, teacher=columns, images=no_images(cfg) if reader is None else cfg.data.images)
    fingerprint, size = tokenizer_fingerprint(tokenizer.get_vocab()), vocabulary_size(tokenizer)
    source = cfg.source if isinstance(cfg.source, OnPolicy) else None
    read_whole = partial(read, keeps_rows=source is not None and kept_of_rows(source) is not None)
    train = TrainingData(cfg.data, encoder, _token_cache(cfg, recipe, encoder, tokenizer, reader), read_whole)
    return Checked(
        tokenizer=tokenizer,
        tokenizer_fingerprint=fingerprint,
        vocabulary_size=size,
        teacher_tokens=encoder.teacher_tokens(with_boundaries=needs_boundaries)
        if isinstance(encoder, OtherTokenizerEncoder)
        else TeacherTokens(fingerprint=fingerprint, size=size, shared=None, image_expansion=expansion_of(reader)),
        encoder=encoder,
        judge_encoder=encoder.of_single_tokens() if isinstance(encoder, OtherTokenizerEncoder) else encoder,
        image_reader=reader,
        train=train,
        held_out=train.held_out() | {name: read(dataset) for name, dataset in cfg.data.held_out_datasets.items()},
        exam=read_questions_of(cfg, tokenizer, reader),
        opinion=None
        if source is None or source.judge is None
        else resolve_judge(source.judge, of_episodes=source.environment is not None),
        environment=None
        if source is None or source.environment is None
        else resolve_environment(source.environment, tokenizer),
        divergence=resolve_divergence(cfg.objective) if isinstance(cfg.objective, Distill) else None,
        build_algorithm=resolve_algorithm(cfg.objective.algorithm) if isinstance(cfg.objective, Distill) else None,
    )


def _token_cache(
    cfg: TrainerConfig,
    recipe: EncoderRecipe,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerFast,
    reader: ImageReader | None,
) -> TokenCache | None:
    if cfg.data.token_cache is None:
        return None
    if reader is not None:
        raise ConfigError(
            f"data.token_cache keeps token ids alone, and {cfg.student.model} reads images: leave data.token_cache out"
        )
    return TokenCache(cfg.data.token_cache, recipe, encoder, recipe.ingredients(tokenizer))
