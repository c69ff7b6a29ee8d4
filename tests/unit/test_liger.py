"""Liger's kernels are put where they belong, its losses nowhere, and a CPU is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3 import modeling_qwen3

from kdmesh.errors import ConfigError
from kdmesh.models.body import load_causal_lm
from kdmesh_trainer.sections.quantization_config import QuantizationConfig
from kdmesh_trainer.student.rounded_modules import round_modules
from tests.support.tiny_models import TinyModels

pytestmark = pytest.mark.slow


def test_norms_and_gated_products_are_liger_s_and_the_loss_is_not(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    from kdmesh_trainer.student.liger import use_liger_kernels

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):  # exchanged in the module; put back by pytest
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    rotary = modeling_qwen3.apply_rotary_pos_emb
    lm = load_causal_lm(tiny_models.path("qwen3", seed=1), torch.float32, torch.device("cpu"))
    forward, names = lm.forward, set(lm.state_dict())
    use_liger_kernels(lm)
    assert lm.forward == forward
    assert set(lm.state_dict()) == names
    assert modeling_qwen3.apply_rotary_pos_emb is not rotary
    for layer in lm.model.layers:
        parts = (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm)
        assert all(part.forward.__func__.__qualname__.startswith("Liger") for part in parts)


def test_gated_products_of_rounded_matrices_are_of_what_they_are_rounded_to(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import swiglu

    from kdmesh_trainer.student.liger import use_liger_kernels

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    kernel = SimpleNamespace(apply=lambda gate, up, *_: torch.nn.functional.silu(gate) * up)  # as on a GPU
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", kernel)
    lm = load_causal_lm(tiny_models.path("qwen3", seed=1), torch.float32, torch.device("cpu"))
    input_, mlp = torch.randn(5, 32), lm.model.layers[0].mlp
    unrounded = mlp(input_)
    round_modules(lm, QuantizationConfig(weights="int8"), torch.float32)
    rounded = mlp(input_)
    use_liger_kernels(lm)
    assert mlp.forward.__func__.__qualname__.startswith("Liger")
    assert torch.equal(mlp(input_), rounded)
    assert not torch.equal(rounded, unrounded)


def test_what_liger_cannot_do_is_refused_before_anything_loads() -> None:
    pytest.importorskip("liger_kernel")
    from kdmesh_trainer.student.liger import check_liger

    known, unknown = AutoConfig.for_model("qwen3"), AutoConfig.for_model("cohere")
    gpu = torch.device("cuda")
    check_liger(known, gpu)
    with pytest.raises(ConfigError, match="needs a GPU: they are Triton's, and the device is a cpu"):
        check_liger(known, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no kernels for model type cohere; it has some for .*qwen3"):
        check_liger(unknown, gpu)


def test_a_missing_package_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    monkeypatch.delitem(sys.modules, "kdmesh_trainer.student.liger", raising=False)
    with pytest.raises(ConfigError, match=r"needs liger-kernel \(pip install 'kdmesh\[liger\]'\)"):
        import kdmesh_trainer.student.liger  # noqa: F401
