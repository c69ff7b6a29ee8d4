"""How the ranks of a trainer share its student, and which memory holds it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError


class ParallelConfig(StrictModel):
    """How ranks share the student, and where they keep it (docs/parallelism.md)."""

    shard_ranks: int | None = Field(None, ge=1)
    """Ranks that hold one copy of the student between them, each of them a part of it; divides the number of ranks.
    null: all of them hold one. Fewer hold several copies (HSDP): more memory, and what is gathered comes from fewer."""

    offload: Literal["none", "all"] = "none"
    """What lies in the host's memory instead of the device's: all is parameters, gradients and AdamW's moments. The
    same student, a slower step; on a CPU both memories are one, and nothing is moved."""

    def check_ranks(self, ranks: int) -> None:
        """Return when so many ranks can share the student like this. Raises ConfigError."""
        if self.shard_ranks is not None and ranks % self.shard_ranks:
            raise ConfigError(
                f"parallel.shard_ranks is {self.shard_ranks} and the job has {ranks} ranks; shard_ranks must divide "
                "their number, so that every copy of the student has as many"
            )
