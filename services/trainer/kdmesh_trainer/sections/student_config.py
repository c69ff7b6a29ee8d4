"""The student, as a trainer's configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.lora_config import LoraConfig
from kdmesh_trainer.sections.quantization_config import QuantizationConfig


class StudentConfig(StrictModel):
    """The model that learns."""

    model: Path
    """Directory of a Hugging Face causal LM with its tokenizer, or hf://OWNER/MODEL on the hub. Required."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """random ignores the checkpoint's weights and starts from the architecture's own initialisation."""

    lora: LoraConfig | None = None
    """Train adapters and freeze the rest; null trains every weight."""

    quantization: QuantizationConfig | None = None
    """Compute with matrices in few bits, and learn to (docs/quantization.md); null: as they are."""

    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Parameters that stay as they are, each by its name or by the beginning of one up to a dot: `model.embed_tokens`,
    `model.layers.0`; `*`, `?` and `[0-3]` stand for characters between dots. A tied head is its embedding."""

    freeze_vision: bool = False
    """Train the language model alone, and not the vision tower with its projector, of a model that reads images."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type of the forward and backward pass; master weights and reductions are always float32. A CPU without
    AVX-512 is many times slower in bfloat16."""

    activation_checkpointing: Literal["none", "half", "all"] = "none"
    """Of which decoder layers (every second one, or all) only the inputs are kept for the backward pass, which then
    computes the rest again: much less memory, up to a third more time, the same gradient."""

    attention: Literal["auto", "each", "varlen"] = "auto"
    """Whether a row's sequences are attended to one by one (each) or, on a GPU in bfloat16, by one call of torch's own
    FlashAttention (varlen); auto takes varlen where the model allows it."""

    compile: Literal["none", "layers"] = "none"
    """layers has torch.compile make fewer and larger kernels of each decoder layer around its attention, in the first
    steps; on a CPU it needs a C++ compiler."""

    liger_kernels: bool = False
    """Norms, rotary embeddings and gated products by Liger's kernels, on a GPU. Needs kdmesh[liger]."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs when there are any."""

    @property
    def checkpointed_every(self) -> int | None:
        """Of every how many-th decoder layer only the inputs are kept; None: of none."""
        return {"none": None, "half": 2, "all": 1}[self.activation_checkpointing]

    @model_validator(mode="after")
    def _options_fit(self) -> StudentConfig:
        if self.lora is not None and self.weights == "random":
            raise ValueError("lora needs weights pretrained: adapters of a random model teach nothing")
        if self.lora is not None and self.freeze:
            raise ValueError("freeze does not go with lora, which freezes every weight: leave freeze out")
        if self.lora is not None and self.quantization is not None:
            raise ValueError(
                "quantization does not go with lora, whose matrices are no parameters that learn: leave one out"
            )
        if self.attention == "varlen" and (self.compute_dtype == "float32" or self.device == "cpu"):
            raise ValueError("attention varlen needs a GPU and compute_dtype bfloat16")
        if self.liger_kernels and self.compile != "none":
            raise ValueError("liger_kernels does not go with compile layers, which makes kernels of the same parts")
        return self
