"""How the rows of student and teacher become a loss, as a trainer's configuration says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kdmesh.config import StrictModel


class VanillaKD(StrictModel):
    """The student's distribution against the teacher's, row by row."""

    name: Literal["vanilla_kd"] = "vanilla_kd"


class CustomAlgorithm(StrictModel):
    """An algorithm of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:Class."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class; checked against its signature before anything loads."""

    learning_rate_factor: float = Field(1.0, gt=0)
    """Learning rate of its own parameters, if it has any, as a multiple of optimizer.learning_rate."""


AlgorithmConfig = Annotated[VanillaKD | CustomAlgorithm, Field(discriminator="name")]
