"""Everything the teacher's SGLang engine can be told."""

from __future__ import annotations

from pydantic import Field

from kdmesh.sglang.config import SglangModel


class SglangEngine(SglangModel):
    """Runs the teacher in SGLang, over one or more GPUs."""

    max_batch_tokens: int = Field(65536, ge=16)
    """Tokens handed to SGLang together, over all requests of a batch."""

    self_probe: bool = True
    """At start, compare rows and distributions of fixed sequences with those of Hugging Face transformers, if the
    model fits in this machine's free memory a second time; else with its first start, whose rows are kept in the
    user's cache directory. A coarse quantization is further off than is allowed."""
