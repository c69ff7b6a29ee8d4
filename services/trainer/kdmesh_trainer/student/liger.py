"""Parts of decoder layers exchanged for Liger's kernels: norms, rotary embeddings, gated products; never its losses."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kdmesh.errors import ConfigError

try:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
except ImportError as error:
    raise ConfigError(f"student.liger_kernels needs liger-kernel (pip install 'kdmesh[liger]'): {error}") from error


def check_liger(model: PretrainedConfig, device: torch.device) -> None:
    """Return when Liger has kernels for the model, and a device that they run on.

    Raises:
        ConfigError: it has none.
    """
    if device.type != "cuda":
        raise ConfigError(f"student.liger_kernels needs a GPU: they are Triton's, and the device is a {device.type}")
    if model.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"student.liger_kernels: Liger has no kernels for model type {model.model_type}; it has some for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}"
        )


def use_liger_kernels(lm: PreTrainedModel) -> None:
    """Have the decoder layers of `lm` compute by Liger's kernels, in place. Before they are sharded.

    Rotary embeddings are exchanged in every model of this process that is of the same type, and the other parts in
    those of them that are built later.
    """
    # The losses are ours, so the forward pass of the whole model stays transformers'.
    _apply_liger_kernel_to_instance(lm, fused_linear_cross_entropy=False, cross_entropy=False)
