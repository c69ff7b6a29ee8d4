"""Writes traces of chosen steps: what every operator and every kernel took."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from kdmesh_trainer.mesh import Mesh

if TYPE_CHECKING:
    from kdmesh_trainer.sections.profile_config import ProfileConfig

log = logging.getLogger(__name__)

_ROWS = 40


class NoProfiler:
    """Looks at nothing."""

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Nothing."""
        yield


class TraceWriter:
    """Two files of each chosen step and rank: a trace that Chrome and Perfetto show, and a table of what took most."""

    def __init__(self, config: ProfileConfig, *, output: Path, mesh: Mesh) -> None:
        """`output` is the run's own directory."""
        self._config = config
        self._directory = config.directory or output / "profile"
        self._rank = mesh.rank
        self._activities = {ProfilerActivity.CPU}
        if mesh.device.type == "cuda":
            self._activities.add(ProfilerActivity.CUDA)

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Trace what happens inside, if the step is one of those. Not collective.

        A trace that cannot be written is told, and no more: the step that it is of is done, and not yet saved.
        """
        if step not in self._config.steps:
            yield
            return
        with profile(
            activities=self._activities,
            record_shapes=self._config.shapes,
            profile_memory=self._config.memory,
            with_stack=self._config.stacks,
        ) as traced:
            yield
            if ProfilerActivity.CUDA in self._activities:
                torch.cuda.synchronize()  # kernels that are still running belong to this step
        stem = self._directory / f"step-{step:08d}-rank-{self._rank}"
        try:
            self._write(traced, stem)
        except OSError as error:
            log.warning("step not traced", extra={"path": str(stem), "why": str(error)})

    def _write(self, traced: profile, stem: Path) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        trace = stem.with_suffix(".json.gz")
        traced.export_chrome_trace(str(trace))
        on_gpu = ProfilerActivity.CUDA in self._activities
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        averages = traced.key_averages()
        table: str = averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
        stem.with_suffix(".txt").write_text(table, encoding="utf-8")
        log.info("step traced", extra={"path": str(trace)})
