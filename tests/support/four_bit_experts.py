"""Directories of gpt-oss as it is published: the experts' weights in MXFP4, all else in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The values of four bits, and 32 of them have one power of two: OCP Microscaling Formats (MX) v1.0, 5.3.3 and 6.3.
FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def in_four_bits(path: Path) -> dict[str, Tensor]:
    """Round the experts in directory `path` to MXFP4, as gpt-oss is published; what its tensors then are."""
    stored, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        rows = tensor.float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, blocks, 32]
        exponents = (rows.abs().amax(-1) / 6).log2().ceil()
        codes = (rows / 2 ** exponents[..., None]).unsqueeze(-1).sub(FOUR_BITS).abs().argmin(-1)
        stored[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        rounded = (FOUR_BITS[codes] * 2 ** exponents[..., None]).flatten(2)
        plain[name] = rounded.transpose(1, 2).to(tensor.dtype)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(config))
    return plain
