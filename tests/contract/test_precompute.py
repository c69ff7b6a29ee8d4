"""Rows are computed ahead of a run: once, no more than fit, and only where they will be found again."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmesh.config import load
from kdmesh.errors import ConfigError
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh_teacher.build import build_engine
from kdmesh_teacher.config import TeacherConfig
from kdmesh_teacher.engine import PrefillJob
from kdmesh_trainer.builders.checked import check
from kdmesh_trainer.builders.data import read_held_out
from kdmesh_trainer.builders.evaluation import build_evaluator
from kdmesh_trainer.builders.teachers import open_teachers
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.mesh import joined
from kdmesh_trainer.precompute import precompute
from kdmesh_trainer.stop import StopSignals
from tests.support.sequences import random_sequences
from tests.support.teacher_server import served
from tests.support.tiny_models import TinyModels
from tests.support.trainer_jobs import write_config
from tests.support.trainer_parts import build_student

MISSING = "127.0.0.1:1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A teacher with a real model."""

    address: str
    prefilled: list[int]  # tokens of every job since the start


@asynccontextmanager
async def teacher(directory: Path, model: Path, **cache: Any) -> AsyncIterator[Server]:
    config = TeacherConfig.model_validate(
        {
            "engine": {"kind": "transformers", "model": str(model), "device": "cpu", "max_batch_tokens": 128},
            "server": {"port": 0, "rest_port": 0},
            "slab": {"slots": 8, "slot_mib": 0.25},
            "cache": cache,
        }
    )
    engine, prefilled = build_engine(config.engine), list[int]()
    prefill = engine.prefill

    def counting(jobs: list[PrefillJob]) -> None:
        prefilled.extend(job.num_tokens for job in jobs)
        prefill(jobs)

    engine.prefill = counting  # type: ignore[method-assign, assignment]
    async with served(config, engine, directory) as (addresses, _, _):
        prefilled.clear()  # what it was proven with
        yield Server(address=addresses.grpc, prefilled=prefilled)


def trainer(directory: Path, model: Path, address: str, *overrides: str) -> TrainerConfig:
    return load(TrainerConfig, write_config(directory, student=model, teacher=address, steps=100), overrides)


class Told:
    """What a person would have seen."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.progress: list[tuple[int, int]] = []

    async def precompute(self, cfg: TrainerConfig, *, is_partial: bool = False) -> tuple[int, int]:
        return await asyncio.to_thread(
            precompute,
            cfg,
            is_partial=is_partial,
            tell=self.sentences.append,
            show=lambda done, total, left_s: self.progress.append((done, total)),
        )


async def test_everything_a_run_asks_for_is_computed_once(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = tiny_models.path()
    async with teacher(tmp_path, model, memory_mib=8) as server:
        cfg = trainer(tmp_path, model, server.address)
        told = Told()
        assert await told.precompute(cfg) == (35, 35)  # 30 to train on, 5 held out
        total = sum(server.prefilled)
        assert f"0 of them are kept already; the others have {total:,} tokens, about " in told.sentences[0]
        done, to_do = told.progress[-1]
        assert 0.9 * total <= done == to_do < total  # but for what the speed was measured with
        server.prefilled.clear()
        again = Told()
        assert await again.precompute(cfg) == (35, 35)
        assert server.prefilled == []
        assert again.sentences[0].endswith("all of them are kept already")


async def test_rows_with_layers_are_kept_as_wide_as_they_are(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = tiny_models.path()
    layers = "objective={name: distill, layers: {pairs: {1: 2, 2: 1}, weight: 1}}"
    async with teacher(tmp_path, model, memory_mib=8) as server:
        plain = trainer(tmp_path, model, server.address)
        layered = trainer(tmp_path, model, server.address, layers)
        sizes = []
        for cfg in (plain, layered):
            told = Told()
            server.prefilled.clear()
            assert await told.precompute(cfg) == (35, 35)
            assert server.prefilled  # rows without layers are others
            size_mib = re.findall(r"rows: ([\d.]+) MiB", told.sentences[0])[0]
            sizes.append(float(size_mib) * 2**20)
        assert "5 of them are kept already" in told.sentences[0]  # those held out, which are judged without layers
        row_bytes = 32 * 4
        num_rows = sum(each.num_rows for each in check(layered).train.sequences())
        assert sizes[1] - sizes[0] == pytest.approx(2 * row_bytes * num_rows, abs=0.1 * 2**20)
        server.prefilled.clear()
        await Told().precompute(layered)
        assert server.prefilled == []


async def test_a_run_that_compares_layers_is_judged_by_final_states_that_were_computed_before_it(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    model = tiny_models.path()

    def kl_nats_per_token(cfg: TrainerConfig) -> float:
        with joined("cpu", longest_wait_s=30) as mesh, ExitStack() as stack:
            checked = check(cfg)
            teachers = open_teachers(cfg, tokens=checked.teacher_tokens, mesh=mesh, signals=StopSignals(), stack=stack)
            assert teachers is not None
            size = teachers.vocabulary_size
            student = build_student(model, mesh, vocabulary_size=size, compute_dtype=torch.float32)
            held_out = read_held_out(cfg, checked)
            evaluator = build_evaluator(cfg, student, held_out, teachers, None, mesh)  # type: ignore[arg-type]
            assert evaluator is not None
            found = evaluator.evaluate().kl_nats_per_token
            assert found is not None
            return found

    async with teacher(tmp_path, model, memory_mib=8) as server:
        layers = "objective={name: distill, layers: {pairs: {1: 2, 2: 1}, weight: 1}}"
        layered = trainer(tmp_path, model, server.address, layers)
        assert await Told().precompute(layered) == (35, 35)
        server.prefilled.clear()
        assert await asyncio.to_thread(kl_nats_per_token, layered) == pytest.approx(0, abs=1e-5)
        assert server.prefilled == []


async def test_an_interrupted_one_goes_on_where_it_was(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = tiny_models.path()

    def stop(done: int, total: int, left_s: float) -> None:
        raise KeyboardInterrupt

    async with teacher(tmp_path, model, memory_mib=8) as server:
        cfg = trainer(tmp_path, model, server.address)

        def interrupted() -> None:
            with pytest.raises(KeyboardInterrupt):
                precompute(cfg, is_partial=False, tell=lambda sentence: None, show=stop)

        await asyncio.to_thread(interrupted)
        told = Told()
        assert await told.precompute(cfg) == (35, 35)
        kept = int(told.sentences[0].split("keeps; ")[1].split()[0])
        assert 0 < kept < 35
        _, total = told.progress[-1]
        assert total < sum(server.prefilled)


@pytest.mark.parametrize("length", [("steps=2",), ("steps=null", "epochs=0.25")])
async def test_a_short_run_is_given_only_what_it_will_ask_for(
    tmp_path: Path, tiny_models: TinyModels, length: tuple[str, ...]
) -> None:
    model = tiny_models.path()
    async with teacher(tmp_path, model, memory_mib=8) as server:
        cfg = trainer(tmp_path, model, server.address, *length)
        assert await Told().precompute(cfg) == (13, 13)  # 2 steps of 4, 5 held out


async def test_a_cache_that_is_too_small_is_refused_before_any_work(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = tiny_models.path()
    async with teacher(tmp_path, model, memory_mib=0.1) as server:
        cfg = trainer(tmp_path, model, server.address)
        with pytest.raises(ConfigError, match=r"keeps 0\.1 MiB, and this run's rows take up to .*--partial"):
            await Told().precompute(cfg)
        assert server.prefilled == []
        told = Told()
        kept, wanted = await told.precompute(cfg, is_partial=True)
        assert 0 < kept == wanted < 35
        assert told.sentences[0] == f"{wanted} of 35 sequences fit: those that the run asks for first"
        assert told.sentences[1].startswith(f"{wanted} sequences with ")


async def test_a_teacher_without_a_cache_is_refused(tmp_path: Path, tiny_models: TinyModels) -> None:
    model = tiny_models.path()
    async with teacher(tmp_path, model) as server:
        with pytest.raises(ConfigError, match="keeps no rows: give its configuration a `cache`"):
            await Told().precompute(trainer(tmp_path, model, server.address))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("teacher.addresses=[]", "teacher.addresses is empty"),
        ("teacher.addresses=['dns:///teachers:1']", "names servers that come and go"),
        ("teacher.follows_student={}", "rows change while it trains"),
    ],
)
async def test_a_run_whose_rows_are_not_known_before_it_is_refused(
    tmp_path: Path, tiny_models: TinyModels, override: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        await Told().precompute(trainer(tmp_path, tiny_models.path(), MISSING, override))


async def test_only_what_the_job_may_have_is_found(tmp_path: Path, tiny_models: TinyModels) -> None:
    asked = random_sequences([20, 30], vocabulary_size=300, seed=0)

    async with teacher(tmp_path, tiny_models.path(), memory_mib=8) as server:

        def find(job: str, *, after: int) -> tuple[bool, ...]:
            with TeacherPool([server.address], job=job) as pool:
                for sequence in asked[:after]:
                    pool.submit([sequence]).wait()
                return pool.find_cached(asked).is_kept

        assert await asyncio.to_thread(find, "a", after=1) == (True, False)
        assert await asyncio.to_thread(find, "b", after=0) == (False, False)
