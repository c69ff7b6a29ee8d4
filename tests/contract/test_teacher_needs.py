"""A teacher that takes less than a job needs is left out, at the start and when it comes back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdmesh.errors import DeadlineExpired, InvalidRequest
from kdmesh.images import noise_image
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.types import PlacedImage, VisionSpec
from tests.support.teacher_process import TeacherProcess, teacher_process, teacher_processes
from tests.support.teacher_requests import expected_rows, sequence

LONG = [sequence(200)]
NARROW = {"engine": {"max_batch_tokens": 128}}


def left_out(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Address and reason of each warning."""
    records = [record.__dict__ for record in caplog.records if record.message == "a teacher is left out"]
    return [(record["address"], record["reason"]) for record in records]


def until(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s


def port_of(teacher: TeacherProcess) -> dict[str, int]:
    return {"port": int(teacher.grpc.split(":")[1])}


def killed(teacher: TeacherProcess) -> None:
    teacher.signal(signal.SIGKILL)
    teacher.process.wait()


def test_one_that_comes_back_narrower_than_the_longest_sequence_gets_nothing_while_another_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        teacher_processes(tmp_path, {}, {}) as (one, two),
        TeacherPool([one.grpc, two.grpc], job="test", deadline_s=30) as pool,
    ):
        pool.require(Needs.of(tokens=200, rows=199))
        killed(one)
        with teacher_process(tmp_path, server=port_of(one), **NARROW):
            until(lambda: left_out(caplog))
            for _ in range(8):
                assert torch.equal(pool.submit(LONG).wait().rows_RD, expected_rows(LONG))
            reason = "it takes sequences of at most 128 tokens, and this job has one of 200"
            assert set(left_out(caplog)) == {(one.grpc, reason)}
            assert pool.describe().max_request_tokens == 256


def test_the_session_with_one_that_is_left_out_ends_at_once(tmp_path: Path) -> None:
    with (
        teacher_processes(tmp_path, {}, NARROW) as (wide, narrow),
        TeacherPool([wide.grpc, narrow.grpc], job="test", deadline_s=30) as pool,
    ):
        pool.require(Needs.of(tokens=200, rows=199))
        # Until its next attempt to be used, which opens another.
        until(lambda: narrow.get("/v1/sessions")["sessions"] == [])


def test_a_job_waits_for_its_only_teacher_to_come_back_as_it_was_and_names_what_is_too_narrow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with teacher_process(tmp_path) as first, TeacherPool([first.grpc], job="test", deadline_s=2) as hasty:
        patient = TeacherPool([first.grpc], job="test", deadline_s=60)
        for pool in (hasty, patient):
            pool.require(Needs.of(tokens=200, rows=199))
        killed(first)
        with patient:
            with teacher_process(tmp_path, server=port_of(first), slab={"slot_mib": 0.004}) as narrow:
                until(lambda: len(left_out(caplog)) == 2)
                kept = patient.submit(LONG)
                with pytest.raises(
                    DeadlineExpired,
                    match=rf"no teacher is ready within 2 s \({narrow.grpc}: it takes sequences of at most \d+ loss "
                    r"tokens, and this job has one of 199\)",
                ):
                    hasty.submit(LONG).wait()
                killed(narrow)
            with teacher_process(tmp_path, server=port_of(first)):
                assert torch.equal(kept.wait().rows_RD, expected_rows(LONG))


def test_of_teachers_that_differ_at_the_start_those_are_asked_that_take_the_longest_sequence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        teacher_processes(tmp_path, NARROW, {}) as (narrow, wide),
        TeacherPool([narrow.grpc, wide.grpc], job="test", deadline_s=30) as pool,
    ):
        assert pool.describe().max_request_tokens == 128
        with pytest.raises(InvalidRequest, match="at most 128"):
            pool.submit(LONG)
        pool.require(Needs.of(tokens=200, rows=199))
        assert pool.describe().max_request_tokens == 256
        for _ in range(8):
            assert torch.equal(pool.submit(LONG).wait().rows_RD, expected_rows(LONG))
        until(lambda: left_out(caplog))
        assert {address for address, _ in left_out(caplog)} == {narrow.grpc}


def test_teachers_that_are_all_too_narrow_stay_for_the_job_to_refuse(tmp_path: Path) -> None:
    with teacher_process(tmp_path, **NARROW) as narrow, TeacherPool([narrow.grpc], job="test", deadline_s=30) as pool:
        pool.require(Needs.of(tokens=200))
        assert pool.describe().max_request_tokens == 128


def test_one_that_reads_no_images_or_smaller_ones_misses_what_a_job_with_images_needs(tmp_path: Path) -> None:
    image = noise_image(40, 30, seed=0)
    placed = PlacedImage(digest=image.digest, first_token=1, num_tokens=4, image=image)
    needs = Needs.of(tokens=9) | Needs.of(images=[placed])
    with teacher_process(tmp_path) as teacher, TeacherPool([teacher.grpc], job="test", deadline_s=30) as pool:
        assert not Needs.of(tokens=9).missed_by(pool.describe())
        assert needs.missed_by(pool.describe()) == "reads no images, and this job has some"
        small = VisionSpec(image_token_id=1, expansion="e", max_image_bytes=2**20, max_image_pixels=1000)
        assert needs.missed_by(replace(pool.describe(), vision=small)) == (
            "takes images of at most 1000 pixels, and this job has one of 1200"
        )


def test_one_whose_slot_is_too_small_for_rows_with_layers_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def holding(rows: int) -> dict[str, dict[str, object]]:
        return {"engine": {"num_layers": 3}, "slab": {"slot_mib": rows * 32 / 2**20}}

    asked = [sequence(100)]
    with (
        teacher_processes(tmp_path, holding(150), holding(400)) as (one, two),
        TeacherPool([one.grpc, two.grpc], job="test", deadline_s=30, layers=[2]) as pool,
    ):
        pool.require(Needs.of(rows=99))
        assert pool.describe().max_request_rows == 200
        until(lambda: left_out(caplog))
        for _ in range(4):
            assert torch.equal(pool.submit(asked).wait().rows_RD, expected_rows(asked, layers=[2]))
        reason = "it takes sequences of at most 75 loss tokens, and this job has one of 99"
        assert set(left_out(caplog)) == {(one.grpc, reason)}
