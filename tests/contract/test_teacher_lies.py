"""An answer that is not the one to the request is never used."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdmesh import errors
from kdmesh.rpc.retry import Deadline
from kdmesh.tokens import digest
from kdmesh.v1 import common_pb2
from kdmesh.v1 import teacher_pb2 as pb
from kdmesh_teacher import servicer
from tests.support.teacher_requests import sequence
from tests.support.teacher_server import running_teacher


def another_digest(result: pb.PrefillResult) -> None:
    result.digest = b"0" * 16


def fewer_rows(result: pb.PrefillResult) -> None:
    result.rows.rows -= 1


def other_columns(result: pb.PrefillResult) -> None:
    result.rows.cols += 1


def another_dtype(result: pb.PrefillResult) -> None:
    result.rows.dtype = common_pb2.DTYPE_BFLOAT16


def other_layers(result: pb.PrefillResult) -> None:
    result.digest = digest([sequence(9)], (1,))


def no_handle(result: pb.PrefillResult) -> None:
    result.ClearField("rows")


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (another_digest, "answered other sequences than it was asked for"),
        (other_layers, "answered other sequences than it was asked for"),
        (fewer_rows, "answered 7 x 8 float32; asked for were 8 rows of 8 float32"),
        (other_columns, "answered 8 x 9 float32"),
        (another_dtype, "answered 8 x 8 bfloat16"),
        (no_handle, "answered with no valid handle"),
    ],
)
async def test_lies_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: object, sentence: str) -> None:
    honest = servicer._result

    def lying(answer: object) -> pb.PrefillResult:
        result = honest(answer)  # type: ignore[arg-type]
        lie(result)  # type: ignore[operator]
        return result

    # Without a handle, only time gives the slot back.
    slab = {"slots": 1, "claim_s": 0.2 if lie is no_handle else 60}
    async with running_teacher(tmp_path, slab=slab) as teacher, teacher.client() as client:
        monkeypatch.setattr(servicer, "_result", lying)
        with pytest.raises(errors.EngineFailure, match=sentence):
            await client.prefill([sequence(9)], Deadline.after(5))
        monkeypatch.undo()
        assert (await client.prefill([sequence(9)], Deadline.after(5))).rows_RD.shape == (8, 8)
