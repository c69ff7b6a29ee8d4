"""Stands in for SGLang's CUDA kernels, which a machine without a GPU cannot load.

Every name and sub-module is there; calling one raises. Text models under the torch-native backends call none, but for
those of linear attention (mamba.py).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from sgl_kernel.mamba import OPERATORS

# Looked up when model files are imported. The signatures do not matter: a model that calls one fails, as it must.
_OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "causal_conv1d_fwd_cpu",
    "causal_conv1d_update_cpu",
    "fused_moe_router_cpu",
    "chunk_gated_delta_rule_cpu",
    "apply_rotary_pos_emb_cpu",
    "rmsnorm_cpu",
    "fused_dual_residual_rmsnorm_cpu",
)
_LIBRARY = torch.library.Library("sgl_kernel", "DEF")
for _name in _OPERATORS:
    _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
for _schema, _function in OPERATORS.items():
    _LIBRARY.impl(_LIBRARY.define(_schema), _function, "CompositeExplicitAutograd")

__version__ = "0.4.10"


class Absent:
    """Any kernel, type or constant; its attributes are absent too."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Absent(f"{self._name}.{attribute}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: this machine has no such kernel."""
        raise NotImplementedError(f"{self._name} needs SGLang's CUDA kernels")


class _SubModule(ModuleType):
    def __getattr__(self, attribute: str) -> Absent:
        return _absent(f"{self.__name__}.{attribute}")


class _SubModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _SubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def __getattr__(attribute: str) -> Absent:
    return _absent(f"{__name__}.{attribute}")


def _absent(name: str) -> Absent:
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return Absent(name)


sys.meta_path.append(_SubModules())
