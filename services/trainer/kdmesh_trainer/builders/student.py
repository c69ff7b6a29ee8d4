"""Builds the student, and what makes its steps fast or small."""

from __future__ import annotations

import logging

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.errors import ConfigError
from kdmesh.losses import VocabularyShare
from kdmesh.models.attention import varlen_refusal
from kdmesh.models.body import empty_causal_lm, load_causal_lm, without_memory
from kdmesh.models.directory import read_config
from kdmesh.models.head import head_spec
from kdmesh.models.recurrent import is_recurrent
from kdmesh.models.verify import check_training
from kdmesh.processor import warn_if_slow
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.optimization.optimizer import check_optimizer
from kdmesh_trainer.sections.parallel_config import ParallelConfig
from kdmesh_trainer.sections.student_config import StudentConfig
from kdmesh_trainer.student.compiled_layers import check_compiler, compile_layers
from kdmesh_trainer.student.freezing import freeze, rest_in_bfloat16
from kdmesh_trainer.student.model import Student, checkpoint_activations, shard
from kdmesh_trainer.student.rounded_modules import round_modules
from kdmesh_trainer.student.spread_head import check_head

log = logging.getLogger(__name__)


def check_speed(cfg: TrainerConfig) -> None:
    """Raises ConfigError when this machine lacks what `cfg` wants to make steps fast or small."""
    check_optimizer(cfg.optimizer)
    device = torch.device("cuda" if cfg.student.device != "cpu" and torch.cuda.is_available() else "cpu")
    if cfg.student.compile == "layers":
        check_compiler(on_gpu=device.type == "cuda")
    if cfg.student.compile == "layers" or cfg.student.attention == "varlen" or cfg.student.liger_kernels:
        model = read_config(cfg.student.model)
        _refuse_recurrent(cfg.student, model)
        is_varlen(cfg.student, model, device)
        if cfg.student.liger_kernels:
            from kdmesh_trainer.student.liger import check_liger  # not at the top: it needs an extra

            check_liger(model, device)


def check_spread(cfg: TrainerConfig) -> None:
    """As `spread`, on a model without memory. Raises ConfigError as that does."""
    spreads_head = cfg.parallel.head == "vocabulary"
    if cfg.student.checkpointed_every is None and not spreads_head:
        return
    with without_memory():
        lm = empty_causal_lm(cfg.student.model)
        if cfg.student.checkpointed_every is not None:
            checkpoint_activations(lm, every=cfg.student.checkpointed_every)
        if spreads_head:
            check_head(lm)


def _refuse_recurrent(cfg: StudentConfig, model: PretrainedConfig) -> None:
    wanted = {"student.compile layers": cfg.compile == "layers", "student.liger_kernels": cfg.liger_kernels}
    unfit = [key for key, is_wanted in wanted.items() if is_wanted]
    if unfit and is_recurrent(model):
        raise ConfigError(
            f"{unfit[0]} does not go with layers that carry a state from token to token, which {cfg.model} has"
        )


def is_varlen(cfg: StudentConfig, model: PretrainedConfig, device: torch.device) -> bool:
    """Whether all sequences of a row are attended to in one call.

    Raises:
        ConfigError: `cfg` wants that, and it is not possible.
    """
    if cfg.attention == "each":
        return False
    refusal = varlen_refusal(model, getattr(torch, cfg.compute_dtype), device)
    if refusal is not None and cfg.attention == "varlen":
        raise ConfigError(f"student.attention varlen is not possible: {refusal}")
    return refusal is None


def load_student(cfg: TrainerConfig, vocabulary_size: int) -> PreTrainedModel:
    """The model in float32 on the CPU, whole; sharding moves each rank's part to its device.

    Raises:
        ConfigError: the directory is no model that can be trained over packed sequences.
    """
    torch.manual_seed(cfg.seed)  # random weights must be the same on every rank
    lm = load_causal_lm(cfg.student.model, torch.float32, torch.device("cpu"), weights=cfg.student.weights)
    check_training(lm)
    head = head_spec(lm, vocabulary_size)
    facts = {"parameters": sum(p.numel() for p in lm.parameters()), "padded_vocabulary": head.padded_vocabulary_size}
    log.info("student loaded", extra={"path": str(cfg.student.model), "vocabulary_size": vocabulary_size, **facts})
    return lm


def freeze_and_round(lm: PreTrainedModel, cfg: StudentConfig) -> None:
    """Leave the parameters that `cfg` names as they are, and round the matrices that it means, in place.

    Raises:
        ConfigError: it names none, or they cannot be rounded.
    """
    if cfg.freeze:
        freeze(lm, cfg.freeze)
        rest_in_bfloat16(lm)
    if cfg.quantization is not None:
        round_modules(lm, cfg.quantization, getattr(torch, cfg.compute_dtype))


def spread(student: Student, cfg: StudentConfig, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Shard the student over the ranks, in place, with its layers compiled and checkpointed as `cfg` says.

    Raises:
        ConfigError: the model's layers or its head do not allow it.
    """
    compute_dtype = getattr(torch, cfg.compute_dtype)
    if mesh.is_first:
        warn_if_slow(compute_dtype, torch.device(mesh.device_mesh.device_type), key="student.compute_dtype")
    if cfg.liger_kernels:
        from kdmesh_trainer.student.liger import use_liger_kernels

        use_liger_kernels(student.lm)
    # From the inside out: what the backward pass computes again is compiled, and FSDP gathers around both.
    if cfg.compile == "layers":
        compile_layers(student.lm)
    if cfg.checkpointed_every is not None:
        checkpoint_activations(student.lm, every=cfg.checkpointed_every)
    shard(
        student,
        mesh.device_mesh,
        compute_dtype=compute_dtype,
        gather=parallel.gather,
        offloads=parallel.offload == "all",
        head_share=VocabularyShare if parallel.head == "vocabulary" else None,
    )
