"""Terms of jobs in a file of their own, which may change while the server runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pydantic import Field

from kdmesh.auth.watched import Watched, read_bytes
from kdmesh.config import StrictModel, load
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.metrics import JobMetrics
from kdmesh.serving.jobs.table import JobTable

T = TypeVar("T", bound=JobTerms)
T_co = TypeVar("T_co", bound=JobTerms, covariant=True)


class JobFile(StrictModel, Generic[T]):
    """What `jobs.file` holds."""

    overrides: dict[str, T] = Field({}, max_length=1000)
    """By the job's name, as `jobs.overrides`."""


class Jobs(Protocol[T_co]):
    """The section `jobs` of a server."""

    @property
    def defaults(self) -> T_co:
        """For every job."""
        ...

    @property
    def overrides(self) -> Mapping[str, T_co]:
        """By the job's name."""
        ...

    @property
    def file(self) -> Path | None:
        """Further overrides."""
        ...


def open_jobs(config: Jobs[T], metrics: JobMetrics) -> JobTable[T]:
    """The jobs of a server, as its configuration says. Raises ConfigError when the file cannot be used."""
    if config.file is None:
        return JobTable(config.defaults, config.overrides)
    path, kind = config.file, type(config.defaults)

    def read() -> Mapping[str, T]:
        read_bytes(path)  # which tells a file that cannot be read from one that says nonsense
        return load(JobFile[kind], path).overrides  # type: ignore[valid-type]

    file = Watched([path], read, on_failure=metrics.unusable("jobs"))
    return JobTable(config.defaults, config.overrides, look=file.current)
