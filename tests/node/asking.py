"""A client that asks a release's teachers for rows without a pause, and looks at every answer."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

from kdmesh.rpc.teachers.pool import TeacherPool
from tests.node.api_server import NAMESPACE
from tests.node.machine import DOMAIN
from tests.support.teacher_requests import expected_rows, sequence

_DEADLINE_S = 120.0


class Asking:
    """Asks while it is open, a context manager; on exit it fails if one answer was wrong, late, or did not come."""

    def __init__(self, service: str, port: int = 50051) -> None:
        """`service`: whose pods are looked up by name, again and again."""
        self.num_answers = 0
        self._address = f"dns:///{service}.{NAMESPACE}.svc.{DOMAIN}:{port}"
        self._is_over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="asking")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            with TeacherPool([self._address], job="asking", deadline_s=_DEADLINE_S) as pool:
                while not self._is_over.is_set():
                    asked = [sequence(20, seed=self.num_answers)]
                    rows_RD = pool.submit(asked).wait().rows_RD
                    assert torch.equal(rows_RD, expected_rows(asked))
                    self.num_answers += 1
        except BaseException as error:  # noqa: BLE001 - a thread's error is raised where it is waited for
            self._error = error
