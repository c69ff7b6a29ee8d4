"""What a trainer can be told of rollout servers, and of how they sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdmesh.auth.config import AccessConfig
from kdmesh.config import StrictModel
from kdmesh_trainer.sections.replicas_config import LONGEST_WAIT_S, Address, are_named, check_can_be_known


class SendingConfig(StrictModel):
    """How the student's weights get to servers."""

    door: Literal["auto", "shm", "collective", "inline"] = "auto"
    """How new weights travel; auto takes shared memory on this node, else a private group of two processes with each
    server, else gRPC messages. Any other is the only one that is taken."""

    advertise: str = ""
    """Address of the first rank's machine that servers on other nodes reach; empty takes that of the interface which
    leads to each."""


class RolloutsConfig(SendingConfig):
    """The rollout servers that sample for this job alone, since they serve its student."""

    addresses: tuple[Address, ...] = ()
    """host:port of each; or dns:/// and k8s:/// names, as teachers have them, of servers that may come and go.
    `kdmesh train --serve-rollout` fills it in."""

    access: AccessConfig = AccessConfig()
    """How this job gets in; it must be an operator there, since it brings new weights."""

    deadline_s: float = Field(600.0, gt=0, le=LONGEST_WAIT_S)
    """Longest wait for one prompt's samples, or for a server to take new weights, restarts included. Samples that are
    asked for steps ahead (source.max_staleness) have as much for each of those steps."""

    @property
    def has_names(self) -> bool:
        """Whether servers may come and go."""
        return are_named(self.addresses)

    @model_validator(mode="after")
    def _can_be_known(self) -> RolloutsConfig:
        check_can_be_known(self.access, self.addresses)
        return self


class SamplingConfig(StrictModel):
    """How responses are drawn; applied in this order: repetition penalty, temperature, top_k, top_p, min_p."""

    temperature: float = Field(1.0, ge=0, le=1e6)
    """Divides the logits; 0 takes the likeliest token."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this; 1 draws from all."""

    top_k: int = Field(0, ge=0, lt=2**31)
    """Draw from this many likeliest tokens; 0 draws from all."""

    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this fraction of the likeliest; 0 drops none."""

    repetition_penalty: float = Field(1.0, gt=0, le=1e6)
    """Divides positive and multiplies negative logits of tokens that the sequence holds; 1 changes nothing."""

    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of a response; a longer one is cut, and nothing is appended to it."""

    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, besides what ends a turn and a text; the tokens that complete one are part of it."""
