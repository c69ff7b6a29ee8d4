"""Reads what a job is trained on and judged by, before a server is waited for, and then asks whether it fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from kdmesh.types import TokenSequence
from kdmesh_trainer.builders.checked import Checked
from kdmesh_trainer.builders.on_policy import Task, check_task, prompt_policy, read_task
from kdmesh_trainer.builders.teachers import Teachers
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.blend import blend_identity, digest_key, parts_of
from kdmesh_trainer.data.kept.stored import SequenceFacts, images_of, sequence_facts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.data.training_data import TrainingData
from kdmesh_trainer.fit import refuse_unlike
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.run_length import num_steps
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.source_config import OffPolicy, OnPolicy
from kdmesh_trainer.sources.judge import kept_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is trained on, and what it is judged by."""

    train: Sequence[TokenSequence] | Task
    held_out: Mapping[str, Sequence[TokenSequence]]  # by name; that of the only dataset is empty
    identity: Mapping[str, str]  # what a checkpoint can only be continued with, by configuration key
    steps: int  # of the whole run

    @property
    def num_images(self) -> int:
        """Over all that is trained on, and judged by."""
        seen = (self.train.prompts, self.train.answers) if isinstance(self.train, Task) else (self.train,)
        return sum(1 for items in (*seen, *self.held_out.values()) for _ in images_of(items))


def read_data(cfg: TrainerConfig, checked: Checked, mesh: Mesh) -> Data:
    """Both datasets. Collective.

    Raises:
        ConfigError: they make fewer steps than what else is configured needs.
        DataError: the data cannot be used.
    """
    cache = checked.train.cache
    if cache is None:
        return _read(cfg, checked)
    # Of the ranks that find nothing, the first makes it where it can: it is the one that shows how far it is.
    mesh.on_first(cache.claim)
    try:
        return _read(cfg, checked)
    finally:
        cache.release()


def check_fit(cfg: TrainerConfig, data: Data, teachers: Teachers) -> None:
    """Return when every teacher takes what it will be asked for.

    Raises:
        DataError: the data do not fit a teacher.
        ModelMismatch: a teacher's image processor makes other numbers of tokens.
    """
    if isinstance(data.train, Task):
        check_task(cfg, data.train, teachers)
    elif isinstance(cfg.objective, Distill):
        teachers.check_requests("train", data.train)
    for name, sequences in data.held_out.items():
        teachers.check_requests(_held_out_name(name), sequences)


def _read(cfg: TrainerConfig, checked: Checked) -> Data:
    train, identity = _read_train(cfg, checked)
    if cfg.data.held_out_share is not None:
        identity["data.held_out"] = str(cfg.data.held_out_share)
    held_out = read_held_out(cfg, checked)
    steps = num_steps(cfg, len(train.prompts if isinstance(train, Task) else train))
    return Data(train=train, held_out=held_out, identity=identity, steps=steps)


def read_alone(cfg: TrainerConfig, data: TrainingData) -> None:
    """Read what is trained on, as a run will, where no teacher says what fits it; a token cache has it from then on.

    Raises:
        DataError: it cannot be used.
    """
    if isinstance(cfg.source, OnPolicy):
        data.prompts(prompt_policy(cfg, cfg.source), kept_of_rows(cfg.source))
    if not isinstance(cfg.source, OnPolicy) or cfg.source.sampled_fraction < 1:
        data.sequences()


def read_held_out(cfg: TrainerConfig, checked: Checked) -> dict[str, Sequence[TokenSequence]]:
    """What the student is judged on, by name, as Data has it. Raises DataError when it cannot be used."""
    return {
        name: load_sequences(
            _held_out_name(name), reader, checked.judge_encoder, cfg.data, max_sequences=cfg.evaluation.max_sequences
        ).sequences
        for name, reader in checked.held_out.items()
    }


def _held_out_name(name: str) -> str:
    return f"held_out.{name}" if name else "held_out"


def _read_train(cfg: TrainerConfig, checked: Checked) -> tuple[Sequence[TokenSequence] | Task, dict[str, str]]:
    match cfg.source:
        case OffPolicy():
            train = checked.train.sequences()
            facts = {name: sequence_facts(part) for name, part in parts_of(train).items()}
            if cfg.data.teacher_tokenizer is not None:
                refuse_unlike(
                    sum(part.aligned_rows for part in facts.values()) / sum(part.rows for part in facts.values()),
                    checked.teacher_tokens,
                    at_least=cfg.data.teacher_tokenizer.min_aligned,
                )
            return train, _identity(train, facts)
        case OnPolicy():
            task = read_task(
                cfg,
                cfg.source,
                data=checked.train,
                encoder=checked.encoder,
                tokenizer=checked.tokenizer,
                tokens=checked.teacher_tokens,
                opinion=checked.opinion,
                environment=checked.environment,
            )
            return task, task.identity()
        case _:
            assert_never(cfg.source)


def _identity(train: Sequence[TokenSequence], facts: Mapping[str, SequenceFacts]) -> dict[str, str]:
    identity = blend_identity(train)
    for name, part in facts.items():
        identity[digest_key("data.train", name)] = part.digest
        if part.teacher_digest != part.digest:
            why = "teacher_tokenizer" if part.has_other_tokenizer else "teacher_context"
            identity[digest_key(f"data.{why}", name)] = part.teacher_digest
        if part.weights:
            identity[digest_key("data.weight_column", name)] = part.weights
        if part.teacher_names:
            identity[digest_key("data.teacher_column", name)] = part.teacher_names
    return identity
