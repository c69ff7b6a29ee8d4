"""Everything the cache of rows can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from kdmesh.config import StrictModel


class CacheConfig(StrictModel):
    """Rows that are kept, so that a sequence that is asked for again is not computed again. Off without a budget."""

    memory_mib: float = Field(0.0, ge=0)
    """Most memory of this process for rows, in MiB; 0 keeps none there."""

    directory: Path | None = None
    """Where rows are kept as files that outlive the server: a local disk, for one server at a time."""

    directory_mib: float | None = Field(None, gt=0)
    """Most space for those files, in MiB; the rows used last stay. Required with `directory`."""

    shared: bool | tuple[str, ...] = False
    """Who gets rows that another job asked for: nobody, all, or the jobs named here, among themselves. Who shares can
    find out, by the time an answer takes, what the others asked for."""

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self.memory_mib > 0 or self.directory is not None

    @property
    def memory_bytes(self) -> int:
        """Budget in memory."""
        return int(self.memory_mib * 2**20)

    @property
    def directory_bytes(self) -> int:
        """Budget on disk."""
        return int((self.directory_mib or 0) * 2**20)

    @model_validator(mode="after")
    def _directory_has_a_budget(self) -> CacheConfig:
        if (self.directory is None) is not (self.directory_mib is None):
            raise ValueError("directory and directory_mib go together: where rows are kept, and how much of them")
        return self
