"""What this machine's processor multiplies at speed."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has fast products of such matrices there.

    A CPU without instructions for a 16-bit type takes ten to three hundred times as long as for float32.
    """
    if device.type != "cpu":
        return True
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is not torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def warn_if_slow(dtype: torch.dtype, device: torch.device, *, key: str) -> None:
    """Tell the log which key of the configuration makes a model many times slower than another would, if it does."""
    if not multiplies(dtype, device):
        said = "this processor has no fast products of this type; float32 is many times faster"
    elif device.type == "cuda" and dtype is torch.float32:
        said = "a GPU's fast products are of shorter types; bfloat16 is many times faster"
    else:
        return
    log.warning(said, extra={"key": key, "dtype": str(dtype).removeprefix("torch.")})
