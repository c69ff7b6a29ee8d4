"""Rounded matrices as compressed-tensors, vLLM and SGLang have them in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor, nn

from kdmesh_trainer.sections.quantization_config import ActivationNumbers, WeightNumbers
from kdmesh_trainer.student.fake_quantization import Rounding

_BITS = {"int4": 4, "int8": 8, "fp8": 8}


class CompressedMatrices:
    """The matrices that a student rounds, all in the same way."""

    def __init__(self, rounding: Rounding, dtype: torch.dtype) -> None:
        """`dtype`: of scales, which hold numbers of bfloat16; codes are multiplied with them in it."""
        self._rounding = rounding
        self._dtype = dtype
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, master: Tensor) -> None:
        """One of them: a file holds its codes, and its scales.

        Args:
            name: in the model; it ends with `.weight`.
            master: whole.
        """
        codes, scales = self._rounding.codes(master)
        whole = {f"{name}_scale": scales.to(self._dtype)}
        if self._rounding.numbers == "fp8":
            whole[name] = codes.to(torch.float8_e4m3fn)
        elif self._rounding.activations != "none":
            whole[name] = codes.to(torch.int8)
        else:
            whole[f"{name}_packed"] = pack_to_int32(codes.to(torch.int8), _BITS[self._rounding.numbers])
            whole[f"{name}_shape"] = torch.tensor(master.shape)
        self._tensors[name] = whole

    def in_place_of_masters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What files hold of a model that has `tensors`."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found |= self._tensors.get(name, {name: tensor})
        return found

    def described(self, model: nn.Module) -> dict[str, Any]:
        """The quantization_config in the configuration of a model, here with plain linear modules."""
        rounding, format_ = self._rounding, _format(self._rounding).value
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=_arguments(
                rounding.numbers,
                QuantizationStrategy.CHANNEL if rounding.group_size is None else QuantizationStrategy.GROUP,
                group_size=rounding.group_size,
            ),
            input_activations=None
            if rounding.activations == "none"
            else _arguments(rounding.activations, QuantizationStrategy.TOKEN, dynamic=True),
            format=format_,
        )
        others = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" not in self._tensors
        ]
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=format_,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=others,
        )
        said: dict[str, Any] = config.model_dump(mode="json")
        return said


def _format(rounding: Rounding) -> CompressionFormat:
    if rounding.activations == "none":
        return CompressionFormat.naive_quantized if rounding.numbers == "fp8" else CompressionFormat.pack_quantized
    return CompressionFormat.float_quantized if rounding.numbers == "fp8" else CompressionFormat.int_quantized


def _arguments(
    numbers: WeightNumbers | ActivationNumbers,
    strategy: QuantizationStrategy,
    *,
    group_size: int | None = None,
    dynamic: bool = False,
) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=_BITS[numbers],
        type=QuantizationType.FLOAT if numbers == "fp8" else QuantizationType.INT,
        strategy=strategy,
        group_size=group_size,
        symmetric=True,
        dynamic=dynamic,
        observer=None if dynamic else "minmax",
    )
