"""Finds an algorithm by its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from kdmesh.errors import ConfigError
from kdmesh.extension import resolve
from kdmesh.losses import Boundaries, Matched
from kdmesh.types import Int32Array
from kdmesh_trainer.algorithms.across_tokenizers import AcrossTokenizers, by_rank, chunk_likelihood, hybrid
from kdmesh_trainer.algorithms.dskd import DualSpaceKD
from kdmesh_trainer.algorithms.dskd_attention import AttendingDualSpaceKD
from kdmesh_trainer.algorithms.seam import Algorithm, Setup
from kdmesh_trainer.algorithms.vanilla_kd import vanilla_kd
from kdmesh_trainer.sections.algorithm_config import (
    AlgorithmConfig,
    ByRank,
    ChunkLikelihood,
    CustomAlgorithm,
    DualSpace,
    Hybrid,
    VanillaKD,
)

BuildAlgorithm = Callable[[Setup], Algorithm]


def resolve_algorithm(cfg: AlgorithmConfig) -> BuildAlgorithm:
    """What builds the algorithm `cfg` names, with its own parameters bound and no others.

    Raises:
        ConfigError: one of the user's own cannot be imported, or does not have the form of `seam.Algorithm`.
    """
    match cfg:
        case VanillaKD():
            return lambda setup: vanilla_kd
        case DualSpace():
            kind: type[DualSpaceKD | AttendingDualSpaceKD]
            kind = DualSpaceKD if cfg.token_alignment == "eta" else AttendingDualSpaceKD
            return partial(kind, trains_lift=cfg.student_projector == "trained")
        case ChunkLikelihood():
            return partial(_chunk_likelihood, cfg)
        case ByRank():
            return lambda setup: AcrossTokenizers(by_rank)
        case Hybrid():
            return partial(_hybrid, cfg)
        case CustomAlgorithm():
            return _custom(cfg)
        case _:
            assert_never(cfg)


def rate_factor(cfg: AlgorithmConfig) -> float:
    """Of the learning rate of its own parameters; 1 where it has none."""
    return cfg.learning_rate_factor if isinstance(cfg, CustomAlgorithm | DualSpace) else 1.0


def _chunk_likelihood(cfg: ChunkLikelihood, setup: Setup) -> Algorithm:
    if cfg.debias_above is None:
        return AcrossTokenizers(partial(chunk_likelihood, tau=cfg.tau))
    assert setup.boundaries is not None  # as the configuration asks
    boundaries = Boundaries(
        student_B=_on(setup.device, setup.boundaries.student_ids),
        teacher_B=_on(setup.device, setup.boundaries.teacher_ids),
        least=cfg.debias_above,
    )
    return AcrossTokenizers(partial(chunk_likelihood, tau=cfg.tau, boundaries=boundaries))


def _hybrid(cfg: Hybrid, setup: Setup) -> Algorithm:
    assert setup.shared is not None  # the configuration's
    matched = Matched(
        student_M=_on(setup.device, setup.shared.student_ids), teacher_M=_on(setup.device, setup.shared.teacher_ids)
    )
    return AcrossTokenizers(
        partial(
            hybrid,
            matched=matched,
            beta=cfg.beta,
            matched_weight=cfg.matched_weight,
            unmatched_weight=cfg.unmatched_weight,
        )
    )


def _on(device: torch.device, token_ids: Int32Array) -> Tensor:
    return torch.from_numpy(token_ids.astype(np.int64)).to(device)


def _custom(cfg: CustomAlgorithm) -> BuildAlgorithm:
    build = resolve(cfg.target, cfg.params, num_arguments=1)
    assert isinstance(build, partial)
    if not isinstance(build.func, type):
        raise ConfigError(f"{cfg.target} is a function; an algorithm is a class, whose objects take (rows, terms)")
    name = "forward" if issubclass(build.func, nn.Module) else "__call__"
    method = next((vars(base)[name] for base in build.func.__mro__ if name in vars(base)), None)
    if method is None or method is nn.Module.forward:
        raise ConfigError(f"{cfg.target} has no {name}(self, rows, terms); an algorithm has one")
    signature = inspect.signature(method)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ConfigError(f"{cfg.target}.{name}{signature} must take (self, rows, terms): {error}") from error
    return build
