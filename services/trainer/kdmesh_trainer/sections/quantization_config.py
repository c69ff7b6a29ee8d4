"""In which numbers a student computes that is to be served in few bits."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from kdmesh.config import StrictModel

WeightNumbers: TypeAlias = Literal["int4", "int8", "fp8"]
ActivationNumbers: TypeAlias = Literal["none", "int8", "fp8"]


class QuantizationConfig(StrictModel):
    """Quantization-aware distillation: the body's linear modules compute with rounded matrices in every pass, and what
    is trained are the matrices in full precision behind them. Needs kdmesh[quantization]."""

    weights: WeightNumbers
    """Numbers that matrices are rounded to, times a scale: int4 (-8 to 7), int8 (-128 to 127), or fp8 (E4M3)."""

    group_size: Literal[32, 64, 128] | None = None
    """Neighbours in a row that share a scale; null: a row has one. int4 wants groups; fp8 has none."""

    activations: ActivationNumbers = "none"
    """Numbers that the inputs of those modules are rounded to, by a scale for each token; none: they are not. Needs the
    same numbers for weights, and a scale for each row."""

    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Linear modules of the body that are not rounded, by names as in student.freeze: `model.layers.0`,
    `model.layers.*.mlp.down_proj`. Embeddings, norms, routers and the head never are."""

    @model_validator(mode="after")
    def _can_be_written(self) -> QuantizationConfig:
        if self.weights == "fp8" and self.group_size is not None:
            raise ValueError(
                f"weights fp8 has a scale for each row, and group_size is {self.group_size}: leave group_size out"
            )
        if self.activations != "none" and self.activations != self.weights:
            raise ValueError(
                f"activations {self.activations} needs weights {self.activations}, not {self.weights}: engines "
                "multiply numbers of one kind"
            )
        if self.activations != "none" and self.group_size is not None:
            raise ValueError(
                f"activations {self.activations} needs a scale for each row of weights, and group_size is "
                f"{self.group_size}: leave group_size out"
            )
        return self
