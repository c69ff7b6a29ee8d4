"""On-policy step time at staleness 0, 1 and 2, beside the time of each phase alone.

The services, the wire, the source and the loop are the real ones. What a GPU would do is a sleep of the time it would
take: each decoding step of the rollout server, each token of the teacher, each micro-batch's forward and backward pass.
Responses end at a token that comes by chance, so that samples come one after the other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.measure import finish, say, server, table
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.weights.sender import WeightSender
from kdmesh.types import DType, Sampling, TokenSequence
from kdmesh.weights.manifest import TensorSpec, UpdatePolicy
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.loop import Parts, Schedule, run
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.sources.early_rows import EarlyRows
from kdmesh_trainer.sources.on_policy import OnPolicySource
from kdmesh_trainer.sources.order import PromptOrder
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.stats import StepStats

_SEQUENCES = 32
_PROMPT_TOKENS, _RESPONSE_TOKENS = 32, 40
_MICRO_BATCHES = 16
_MICRO_TOKENS = _SEQUENCES * (_PROMPT_TOKENS + _RESPONSE_TOKENS) // _MICRO_BATCHES
_VOCABULARY = 64
_STOPS = (0, 1)
# Of a response: every token is one of the stops with the same chance, and the last one that may be is not waited for.
_MEAN_TOKENS = round((1 - (1 - len(_STOPS) / _VOCABULARY) ** _RESPONSE_TOKENS) * _VOCABULARY / len(_STOPS))
_EARLY_ROWS = _SEQUENCES * _RESPONSE_TOKENS * 3
_WARM_UP = 2  # steps
_AIM = 1.1
_SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (_VOCABULARY, 8), "norm.weight": (8,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gpu:
    """Seconds that each phase of one step pretends to take."""

    name: str
    sampling_s: float
    teacher_s: float
    update_s: float


_GPUS = (
    _Gpu(name="sampling is slowest", sampling_s=1.0, teacher_s=0.5, update_s=0.6),
    _Gpu(name="all alike", sampling_s=0.8, teacher_s=0.8, update_s=0.8),
    _Gpu(name="the teacher is slowest", sampling_s=0.6, teacher_s=1.0, update_s=0.5),
    _Gpu(name="the update is slowest", sampling_s=0.5, teacher_s=0.5, update_s=1.0),
)


class _Student:
    """A student of two small tensors, which is what the fake rollout engine serves; the trainer's side of it."""

    def __init__(self, sender: WeightSender) -> None:
        self._sender = sender
        self._version = max(served.version for served in sender.describe())

    def publish(self, *, version: int) -> None:
        """Send other weights than before."""
        self._version += 1
        tensors = [
            (
                TensorSpec(name=name, shape=shape, dtype=DType.FLOAT32),
                functools.partial(torch.full, shape, float(version)),
            )
            for name, shape in _SHAPES.items()
        ]
        fingerprint = f"fa4e{_VOCABULARY:08x}float32"
        self._sender.publish(self._version, fingerprint, tensors, UpdatePolicy.FINISH)

    def catch_up(self, among: Collection[str]) -> None:
        """Nobody lags behind: the server does not die."""

    @property
    def behind(self) -> frozenset[str]:
        """Nobody."""
        return frozenset()

    def weight_version(self, version: int) -> int:
        """The newest."""
        return self._version


class _SleepingStepper:
    """Waits for the teacher's rows, and sleeps for the time that a GPU would take to learn from them."""

    def __init__(self, update_s: float) -> None:
        self._update_s = update_s

    def update(self, batch: StepBatch) -> StepStats:
        """One step; micro-batches take their share of the time."""
        wait_s = 0.0
        for micro_batch in batch.micro_batches:
            began_s = time.perf_counter()
            assert micro_batch.teacher is not None
            micro_batch.teacher.wait()
            wait_s += time.perf_counter() - began_s
            time.sleep(self._update_s / len(batch.micro_batches))
        return StepStats(
            loss_nats_per_token=0.0,
            divergence_nats_per_token=0.0,
            cross_entropy_nats_per_token=None,
            top1_agreement=None,
            gradient_norm=0.0,
            learning_rate=0.0,
            num_loss_tokens=batch.num_loss_tokens,
            num_tokens=batch.num_tokens,
            teacher_wait_s=wait_s,
            rollouts=batch.rollouts,
        )


class _Clock:
    """The loop's telemetry: when each step was done, and how long its phases took."""

    def __init__(self) -> None:
        self.done_s: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._phase_s: dict[str, float] = {}

    def start(self, first_step: int, steps: int, *, is_judged: bool) -> None:
        """Nothing."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        began_s = time.perf_counter()
        yield
        self._phase_s[name] = self._phase_s.get(name, 0.0) + time.perf_counter() - began_s

    def report(self, step: int, stats: StepStats) -> None:
        """The step is done."""
        self.done_s.append(time.perf_counter())
        self.phases.append(self._phase_s)
        self._phase_s = {}

    def report_answers(self, step: int, scores: object) -> None:
        """There are none."""

    def report_scores(self, step: int, scores: object) -> None:
        """Nothing is judged."""

    @property
    def step_s(self) -> float:
        """Median time from step to step, after the first ones."""
        steps = [after - before for before, after in itertools.pairwise(self.done_s)]
        return statistics.median(steps[_WARM_UP:])

    def median_s(self, phase: str) -> float:
        """Of a phase, after the first steps."""
        return statistics.median(phases[phase] for phases in self.phases[_WARM_UP:])


class _Nothing:
    """No checkpoints, and nobody who wants to stop."""

    def restore(self) -> int:
        """The first step."""
        return 0

    def save(self, *, next_step: int) -> None:
        """Nothing."""

    def is_wanted(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Services:
    """Connections to both servers, which pretend to have one GPU each."""

    teacher: TeacherPool
    rollouts: RolloutPool
    student: _Student


@contextmanager
def _serving(gpu: _Gpu, folder: Path) -> Iterator[_Services]:
    rollout = {
        "kind": "fake",
        "vocabulary_size": _VOCABULARY,
        "max_running": 4 * _SEQUENCES,
        "seconds_per_step": gpu.sampling_s / _RESPONSE_TOKENS,
    }
    teacher = {
        "kind": "fake",
        "vocabulary_size": _VOCABULARY,
        "max_batch_tokens": _MICRO_TOKENS,
        "seconds_per_token": gpu.teacher_s / (_SEQUENCES * (_PROMPT_TOKENS + _MEAN_TOKENS)),
    }
    slab = {"slots": 64, "slot_mib": 1, "slots_per_session": 64}
    more: dict[str, dict[str, Any]] = {"kdmesh_teacher": {"slab": slab}, "kdmesh_rollout": {}}
    with ExitStack() as stack:
        addresses = {}
        for package, engine in (("kdmesh_rollout", rollout), ("kdmesh_teacher", teacher)):
            config, ready = folder / f"{package}.yaml", folder / f"{package}.json"
            tree = {"engine": engine, "server": {"port": 0, "rest_port": 0}, **more[package]}
            config.write_text(yaml.safe_dump(tree), encoding="utf-8")
            command = [sys.executable, "-m", package, str(config), "--ready-file", str(ready)]
            addresses[package] = stack.enter_context(server(command, ready))
        sender = stack.enter_context(WeightSender([addresses["kdmesh_rollout"]]))
        yield _Services(
            teacher=stack.enter_context(TeacherPool([addresses["kdmesh_teacher"]], job="overlap")),
            rollouts=stack.enter_context(RolloutPool([addresses["kdmesh_rollout"]], job="overlap")),
            student=_Student(sender),
        )


def _prompts() -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [Prompt(token_ids=draw.integers(0, _VOCABULARY, _PROMPT_TOKENS, dtype=np.int32)) for _ in range(97)]


def _train(
    services: _Services, gpu: _Gpu, mesh: Mesh, *, max_staleness: int, steps: int, early_rows: int = _EARLY_ROWS
) -> _Clock:
    """The loop as a trainer runs it."""
    source = OnPolicySource(
        Sampler(
            PromptOrder(_prompts(), per_step=_SEQUENCES, seed=0),
            services.rollouts,
            sampling=Sampling(max_new_tokens=_RESPONSE_TOKENS, stop_token_ids=_STOPS),
            samples_per_prompt=1,
            rank=0,
            ranks=1,
        ),
        services.student,
        EarlyRows(services.teacher, most_rows=early_rows, is_frozen=True),
        max_staleness=max_staleness,
        max_tokens=_MICRO_TOKENS,
        prefetch=8,
        steps=steps,
        mesh=mesh,
    )
    clock, nothing = _Clock(), _Nothing()
    parts = Parts(
        source=source,
        stepper=_SleepingStepper(gpu.update_s),
        publishers=(source,),
        evaluator=None,
        checkpoints=nothing,
        exporters=(),
        stop=nothing,
        telemetry=clock,
    )
    run(parts, Schedule(steps=steps, evaluate_every=None, checkpoint_every=None))
    source.close()
    return clock


def _teacher_alone_s(services: _Services) -> float:
    """Seconds for the rows of one step, while nothing else happens."""
    draw = np.random.default_rng(1)
    length = _PROMPT_TOKENS + _MEAN_TOKENS
    positions = np.arange(_PROMPT_TOKENS - 1, length - 1, dtype=np.int32)
    sequences = [
        TokenSequence(token_ids=draw.integers(0, _VOCABULARY, length, dtype=np.int32), positions=positions)
        for _ in range(_SEQUENCES)
    ]
    size = _SEQUENCES // _MICRO_BATCHES
    began_s = time.perf_counter()
    for pending in [services.teacher.submit(sequences[first : first + size]) for first in range(0, _SEQUENCES, size)]:
        pending.wait()
    return time.perf_counter() - began_s


def _measure(gpu: _Gpu, mesh: Mesh, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of each phase alone, and of a step at each staleness."""
    with _serving(gpu, folder) as services:
        late = _train(services, gpu, mesh, max_staleness=0, steps=steps, early_rows=0)
        clocks = [_train(services, gpu, mesh, max_staleness=k, steps=steps) for k in range(3)]
        alone = {
            "sampling": clocks[0].median_s("batch"),
            "teacher": statistics.median(_teacher_alone_s(services) for _ in range(3)),
            "update": gpu.update_s,
            "publish": clocks[0].median_s("publish"),
        }
        steps_s = {f"staleness_{k}": clock.step_s for k, clock in enumerate(clocks)}
        return {**alone, **steps_s, "staleness_0_late": late.step_s}


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    rows, ratios, gains = [], {}, {}
    with joined("cpu", longest_wait_s=60) as mesh:
        for gpu in _GPUS:
            with tempfile.TemporaryDirectory() as folder:
                seconds = _measure(gpu, mesh, Path(folder), arguments.steps)
            slowest_s = max(seconds[phase] for phase in ("sampling", "teacher", "update"))
            ratios[gpu.name] = [seconds[f"staleness_{k}"] / slowest_s for k in range(3)]
            steps_s = [f"{seconds[f'staleness_{k}']:.3f} ({ratios[gpu.name][k]:.2f})" for k in range(3)]
            gains[gpu.name] = round(seconds["staleness_0_late"] / seconds["staleness_0"], 3)
            steps_s.insert(0, f"{seconds['staleness_0_late']:.3f}")
            phases = [f"{seconds[phase]:.3f}" for phase in ("sampling", "teacher", "update", "publish")]
            rows.append([gpu.name, *phases, *steps_s])
    say("Simulated GPUs: sampling, the teacher and the update sleep. Seconds; in brackets, of the slowest phase alone.")
    say("Late: the teacher is asked when all samples of the step are here, else as each of them comes.")
    table(["", "sampling", "teacher", "update", "publish", "0, late", *(f"staleness {k}" for k in range(3))], rows)
    worst = max(each[1] for each in ratios.values())
    say(f"staleness 1 takes at most {worst:.2f} of the slowest phase; the aim is {_AIM}")
    rounded = {name: [round(r, 3) for r in each] for name, each in ratios.items()}
    finish("overlap", {"ratios": rounded, "late_over_early": gains, "aim": _AIM})


if __name__ == "__main__":
    main()
