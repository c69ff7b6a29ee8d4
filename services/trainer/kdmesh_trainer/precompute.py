"""Has the teachers of a run keep its rows before it trains."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kdmesh.errors import ConfigError
from kdmesh.rpc.teachers.pending_rows import PendingRows
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.rpc.teachers.splitting import split
from kdmesh.tokens import digest
from kdmesh.types import CacheAnswer, TokenSequence
from kdmesh_trainer.builders.checked import Checked, check
from kdmesh_trainer.builders.data import read_held_out
from kdmesh_trainer.builders.teachers import refuse_no_address
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.encoding.sides import Addressed, teacher_side
from kdmesh_trainer.fit import check_frozen, check_requests, common_vocabulary
from kdmesh_trainer.run_length import num_steps
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sections.teacher_config import teacher_key
from kdmesh_trainer.sources.order import step_order

_MIB = 2**20
_SAMPLE_TOKENS = 4096
_PASSES = 3  # a disk that is slower than the engine leaves holes; each pass fills some


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one teacher has to do and to keep."""

    address: str
    sequences: int
    rows: int
    size_bytes: int  # at most
    budget_bytes: int
    kept: int  # sequences that it has
    missing_tokens: int
    tokens_per_s: float | None

    def sentence(self) -> str:
        """For a person."""
        size = f"{self.size_bytes / _MIB:,.1f} MiB of the {self.budget_bytes / _MIB:,.1f} MiB"
        if not self.missing_tokens:
            left = "all of them are kept already"
        else:
            pace = "" if self.tokens_per_s is None else f", {_duration(self.missing_tokens / self.tokens_per_s)}"
            left = f"{self.kept:,} of them are kept already; the others have {self.missing_tokens:,} tokens{pace}"
        return f"{self.sequences:,} sequences with {self.rows:,} rows: {size} that {self.address} keeps; {left}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A sequence, as the teacher reads it, whose rows are to be kept."""

    sequence: TokenSequence
    has_layers: bool  # rows with the outputs of `objective.layers`


Show = Callable[[int, int, float], None]
"""Is told of tokens done, tokens to do, and seconds left."""


def precompute(cfg: TrainerConfig, *, is_partial: bool, tell: Callable[[str], None], show: Show) -> tuple[int, int]:
    """Ask each teacher for what it has not kept of the sequences that this run will ask for; blocks.

    May be interrupted at any time: what was computed is kept.

    Args:
        is_partial: go on when not all fits, with what is trained on first.
        tell: is given sentences.
        show: is given figures, often.

    Returns:
        Over all teachers, how many sequences they have kept, and how many they were to keep.

    Raises:
        ConfigError: this run asks for nothing that is known before it, or the cache is too small.
        DataError: the data cannot be used.
        RpcError: a teacher does not answer, or does not fit.
    """
    _refuse_unknown(cfg)
    checked = check(cfg)
    rows = list(_wanted(cfg, checked))
    kept = wanted = 0
    for name, teacher in cfg.all_teachers.items():
        for address in teacher.addresses:
            with TeacherPool(
                [address],
                job=cfg.job_name,
                door=teacher.door,
                deadline_s=teacher.deadline_s,
                access=teacher.access,
                layers=() if cfg.layers is None else cfg.layers.of_teacher,
            ) as pool:
                filling = _Filling(pool, address, ahead=teacher.prefetch + 1, show=show)
                own = filling.choose(_of_teacher(name, rows), checked, is_partial=is_partial, tell=tell)
                kept += filling.fill(own)
                wanted += len(own)
    return kept, wanted


class _Filling:
    """One teacher."""

    def __init__(self, pool: TeacherPool, address: str, *, ahead: int, show: Show) -> None:
        self._pool = pool
        self._address = address
        self._ahead = ahead
        self._show = show

    def choose(
        self, wanted: Sequence[_Wanted], checked: Checked, *, is_partial: bool, tell: Callable[[str], None]
    ) -> Sequence[_Wanted]:
        """What it is to keep of that. Raises ConfigError when not all fits, unless `is_partial`."""
        if not wanted:
            return wanted
        model = self._pool.describe()
        check_frozen(model)
        common_vocabulary(
            model,
            tokenizer_fingerprint=checked.teacher_tokens.fingerprint,
            vocabulary_size=checked.teacher_tokens.size,
        )
        sequences = [each.sequence for each in wanted]
        check_requests("train", sequences, model, image_expansion=checked.teacher_tokens.image_expansion)
        estimate = self._estimate(wanted)
        if not estimate.budget_bytes:
            raise ConfigError(f"{self._address} keeps no rows: give its configuration a `cache` with a budget")
        if estimate.size_bytes <= estimate.budget_bytes:
            chosen = wanted
        elif is_partial:
            chosen = self._fitting(wanted, estimate.budget_bytes)
            estimate = self._estimate(chosen)
            tell(f"{len(chosen):,} of {len(wanted):,} sequences fit: those that the run asks for first")
        else:
            raise ConfigError(
                f"{self._address} keeps {estimate.budget_bytes / _MIB:,.1f} MiB, and this run's rows take up to "
                f"{estimate.size_bytes / _MIB:,.1f} MiB: raise the budget, or take what fits with --partial"
            )
        if estimate.tokens_per_s is None and estimate.missing_tokens:
            estimate = replace(estimate, tokens_per_s=self._measured(chosen, estimate.missing_tokens))
        tell(estimate.sentence())
        return chosen

    def fill(self, wanted: Sequence[_Wanted]) -> int:
        """Have it keep these; the number that it has in the end."""
        for _ in range(_PASSES):
            missing = self._missing(wanted)
            if not missing:
                break
            self._ask(missing)
        return len(wanted) - len(self._missing(wanted))

    def _estimate(self, wanted: Sequence[_Wanted]) -> Estimate:
        answers = [self._found(group) for group in self._groups(wanted)]
        self._entry_bytes = answers[0].entry_bytes
        is_kept = [kept for answer in answers for kept in answer.is_kept]
        return Estimate(
            address=self._address,
            sequences=len(wanted),
            rows=sum(each.sequence.num_rows for each in wanted),
            size_bytes=sum(map(self._size_bytes, wanted)),
            budget_bytes=answers[0].budget_bytes,
            kept=sum(is_kept),
            missing_tokens=_tokens(each for each, kept in zip(wanted, is_kept, strict=True) if not kept),
            tokens_per_s=answers[0].tokens_per_s,
        )

    def _fitting(self, wanted: Sequence[_Wanted], budget_bytes: int) -> Sequence[_Wanted]:
        """As many of the first ones as there is room for; at least one."""
        sizes = itertools.accumulate(map(self._size_bytes, wanted))
        return wanted[: max(1, sum(size <= budget_bytes for size in sizes))]

    def _measured(self, wanted: Sequence[_Wanted], missing_tokens: int) -> float | None:
        """Tokens per second of a server that has computed nothing yet, over a small part of what is missing."""
        sample = list[_Wanted]()
        for each in self._missing(wanted):
            sample.append(each)
            if _tokens(sample) > min(_SAMPLE_TOKENS, missing_tokens / 16):
                break
        for group in self._groups(sample):
            _asked(self._pool, group).wait()
        return self._found(sample[:1]).tokens_per_s

    def _size_bytes(self, wanted: _Wanted) -> int:
        return wanted.sequence.num_rows * self._pool.row_bytes(has_layers=wanted.has_layers) + self._entry_bytes

    def _missing(self, wanted: Sequence[_Wanted]) -> list[_Wanted]:
        found = [kept for group in self._groups(wanted) for kept in self._found(group).is_kept]
        return [each for each, kept in zip(wanted, found, strict=True) if not kept]

    def _found(self, group: Sequence[_Wanted]) -> CacheAnswer:
        return self._pool.find_cached([each.sequence for each in group], has_layers=group[0].has_layers)

    def _groups(self, wanted: Sequence[_Wanted]) -> list[tuple[_Wanted, ...]]:
        """In order, each with layers or without."""
        groups = []
        for has_layers, run in itertools.groupby(wanted, key=lambda each: each.has_layers):
            for part in split([each.sequence for each in run], self._pool.describe()):
                groups.append(tuple(_Wanted(sequence=sequence, has_layers=has_layers) for sequence in part))
        return groups

    def _ask(self, wanted: Sequence[_Wanted]) -> None:
        """Get their rows, and drop them."""
        total, done, began_s = _tokens(wanted), 0, time.monotonic()
        for group in _answered(self._pool, self._groups(wanted), ahead=self._ahead):
            done += _tokens(group)
            self._show(done, total, (time.monotonic() - began_s) / done * (total - done))


def _answered(pool: TeacherPool, groups: Sequence[tuple[_Wanted, ...]], *, ahead: int) -> Iterator[tuple[_Wanted, ...]]:
    """The groups in order, as they are answered, while the next ones are computed."""
    waiting = deque[tuple[tuple[_Wanted, ...], PendingRows]]()
    for group in groups:
        waiting.append((group, _asked(pool, group)))
        if len(waiting) > ahead:
            first, rows = waiting.popleft()
            rows.wait()
            yield first
    while waiting:
        first, rows = waiting.popleft()
        rows.wait()
        yield first


def _asked(pool: TeacherPool, group: Sequence[_Wanted]) -> PendingRows:
    return pool.submit([each.sequence for each in group], has_layers=group[0].has_layers)


def _tokens(wanted: Iterable[_Wanted]) -> int:
    return sum(each.sequence.num_tokens for each in wanted)


def _refuse_unknown(cfg: TrainerConfig) -> None:
    """Raises ConfigError when the run asks nobody, or not for what the data alone decides."""
    if isinstance(cfg.source, OnPolicy):
        raise ConfigError("source.kind is on_policy: what it asks the teacher is sampled while it trains")
    if not (isinstance(cfg.objective, Distill) or cfg.data.held_out is not None):
        raise ConfigError("this run asks the teacher for nothing: it does not distil, and has no held-out data")
    if not cfg.all_teachers:
        raise ConfigError("there is no `teacher` section, so nobody is asked")
    refuse_no_address(cfg)
    for name, teacher in cfg.all_teachers.items():
        key = teacher_key(name)
        if teacher.follows_student is not None:
            raise ConfigError(f"{key}.follows_student is set: the rows change while it trains")
        if teacher.has_names:
            raise ConfigError(
                f"{key}.addresses names servers that come and go: each keeps rows of its own, so name each one as "
                f"host:port, with --set {key}.addresses=[...]"
            )


def _wanted(cfg: TrainerConfig, checked: Checked) -> Iterator[_Wanted]:
    """All that the run asks for, as the teacher reads it: held-out data, then what is trained on, in its order."""
    for sequences in read_held_out(cfg, checked).values():
        yield from (_Wanted(sequence=each, has_layers=False) for each in teacher_side(sequences))
    if isinstance(cfg.objective, Distill):
        train = checked.train.sequences()
        order = step_order(train, per_step=cfg.batch.sequences, seed=cfg.seed)
        for step in range(min(num_steps(cfg, len(train)), order.first_pass_steps)):  # these have them all
            for index in order.of_step(step):
                for each in teacher_side([train[index]]):
                    yield _Wanted(sequence=each, has_layers=cfg.layers is not None)


def _of_teacher(name: str, wanted: Sequence[_Wanted]) -> list[_Wanted]:
    """What one teacher is asked for, each once."""
    own = [each for each in wanted if not isinstance(each.sequence, Addressed) or each.sequence.teacher_name == name]
    return list({(digest([each.sequence]), each.has_layers): each for each in own}.values())


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes:,} min" if minutes else f"about {max(1, round(seconds))} s"
