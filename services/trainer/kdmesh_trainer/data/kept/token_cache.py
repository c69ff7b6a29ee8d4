"""Token ids in files, made once for all ranks and jobs of a machine.

DIRECTORY/.lock           held by the process that makes something
DIRECTORY/files/...       what dataset files hold; see file_digests.py
DIRECTORY/abcd.../        the records of one dataset, named by all that they follow from; see record_store.py
DIRECTORY/*.writing/      being made, or left behind by a process that was killed
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from kdmesh.errors import ConfigError, DataError
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.recipe import Encoder, EncoderRecipe
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.files.file_digests import FileDigests
from kdmesh_trainer.data.files.held_out_rows import all_held_out
from kdmesh_trainer.data.files.pieces import size_of
from kdmesh_trainer.data.files.readers import ChatFiles
from kdmesh_trainer.data.kept.forms import Form
from kdmesh_trainer.data.kept.record_store import Damaged, Records, RecordWriter, opened
from kdmesh_trainer.data.kept.stored import PromptFacts, SequenceFacts, Stored, measured, measured_prompts
from kdmesh_trainer.data.kept.tokenising import Work, tokenised
from kdmesh_trainer.data.prompts import PromptPolicy, PromptReport
from kdmesh_trainer.data.reading_progress import reading_shown
from kdmesh_trainer.data.sequences import DataReport
from kdmesh_trainer.saving.files import replacing
from kdmesh_trainer.sections.data_config import TokenCacheConfig

log = logging.getLogger(__name__)

# Part of every name: raise it when chats become other tokens than before, or files are written otherwise.
_FORMAT = 4


T = TypeVar("T")
F = TypeVar("F", bound=SequenceFacts | PromptFacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product(Generic[T, F]):
    """What is kept of a dataset."""

    work: Work
    form: Form[T]
    measure: Callable[[Sequence[T]], F]
    facts: Callable[[Mapping[str, Any]], F]  # from plain values
    report: Callable[..., DataReport | PromptReport]  # likewise, by keyword
    policy: Mapping[str, Any]


class TokenCache:
    """Datasets as records in files; of those that are asked for, what is not there is made.

    One process makes something in a directory at a time, and the others that want something made wait for it: what
    they want is mostly the same.
    """

    def __init__(
        self,
        cfg: TokenCacheConfig,
        recipe: EncoderRecipe,
        encoder: Encoder,
        ingredients: Mapping[str, Any],
    ) -> None:
        """
        Args:
            encoder: of the recipe.
            ingredients: of the recipe.
        """
        self._cfg = cfg
        self._recipe = recipe
        self._encoder = encoder
        self._ingredients = ingredients
        self._digests = FileDigests(cfg.directory / "files")
        self._claim: IO[str] | None = None

    def sequences(self, name: str, chats: ChatFiles) -> Stored[TokenSequence, SequenceFacts]:
        """The sequences of a dataset, as load_sequences gives them.

        Args:
            name: for logs and errors.

        Raises:
            DataError: as load_sequences; a process that tokenises dies; the directory cannot be used.
        """
        work = Work(recipe=self._recipe, chats=chats)
        data = self._recipe.data
        return self._get(
            name,
            _Product(
                work=work,
                form=work.sequence_form,
                measure=measured,
                facts=SequenceFacts.of_tree,
                report=DataReport,
                policy={
                    "max_tokens": data.max_tokens,
                    "too_long": data.too_long,
                    "unusable": data.unusable,
                    "trained_turns": data.trained_turns,
                },
            ),
        )

    def prompts(self, name: str, chats: ChatFiles, policy: PromptPolicy) -> Stored[Prompt, PromptFacts]:
        """The prompts of a dataset, as load_prompts gives them; arguments and errors are those of `sequences`."""
        work = Work(recipe=self._recipe, chats=chats, prompts=policy)
        return self._get(
            name,
            _Product(
                work=work,
                form=work.prompt_form,
                measure=measured_prompts,
                facts=lambda tree: PromptFacts(**tree),
                report=PromptReport,
                policy={"prompts": asdict(policy)},
            ),
        )

    def claim(self) -> None:
        """Be the one that makes what is missing, until `release`, unless another process is: then it is waited for.

        Raises:
            ConfigError: the directory cannot be made, or is on a file system without locks.
        """
        lock = self._lock_file()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        except OSError as error:
            lock.close()
            directory = self._cfg.directory
            raise ConfigError(f"data.token_cache.directory: {directory} cannot be locked: {error}") from error
        else:
            self._claim = lock

    def release(self) -> None:
        """Let others make what they miss."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _get(self, name: str, product: _Product[T, F]) -> Stored[T, F]:
        try:
            found = self._look(name, product, is_to_make=False)
            if found is None:
                with self._turn():
                    for file in product.work.chats.files:
                        self._digests.read(file)
                    found = self._look(name, product, is_to_make=True) or self._make(name, product)
        except OSError as error:
            raise DataError(f"data.token_cache.directory: {self._cfg.directory} cannot be used: {error}") from error
        return found

    def _look(self, name: str, product: _Product[T, F], *, is_to_make: bool) -> Stored[T, F] | None:
        """What is there; None: nothing, or nothing that can be used. `is_to_make`: then it will be made."""
        made_of = self._made_of(product)
        if made_of is None:
            return None
        entry = self._entry(made_of)
        try:
            records, said = opened(entry, product.form.num_arrays)
        except FileNotFoundError:
            return None
        except Damaged as error:
            if is_to_make:
                facts = {"path": str(entry), "why": str(error)}
                log.warning("token ids are damaged, so they are made again", extra=facts)
            return None
        product.report(**said["report"]).tell(name, path=str(entry))
        return Stored(records, product.form, product.facts(said["facts"]))

    def _make(self, name: str, product: _Product[T, F]) -> Stored[T, F]:
        made_of = self._made_of(product)
        assert made_of is not None  # its files have been read
        entry = self._entry(made_of)
        self._remove_unfinished()
        with replacing(entry) as writing:
            writing.mkdir(mode=0o700)
            with RecordWriter(writing) as writer:
                report = self._write(name, product.work, writer)
                report.tell(name, path=str(entry))
                writer.flush()
                records = Records(writing, product.form.num_arrays)
                facts = product.measure(Stored(records, product.form, None))
                writer.finish({"report": asdict(report), "facts": asdict(facts), "made_of": made_of})
            if self._made_of(product) != made_of:
                raise DataError(f"dataset {product.work.chats.name} has changed while it was read")
        return Stored(Records(entry, product.form.num_arrays), product.form, facts)

    def _write(self, name: str, work: Work, writer: RecordWriter) -> DataReport | PromptReport:
        report: Any = None
        done_bytes = 0
        size_bytes = sum(map(size_of, work.chats.files))
        pieces = tokenised(work, self._encoder, workers=self._cfg.workers)
        with reading_shown(name, size_bytes=size_bytes) as show, closing(pieces):
            for piece, taken in pieces:
                writer.add(taken.lengths, taken.numbers)
                report = taken.report if report is None else report.plus(taken.report)
                done_bytes += piece.size_bytes
                show(done_bytes, report.rows)
        share = self._recipe.data.held_out_share
        if share is not None and report is not None and not report.rows:
            next(work.chats())  # raises when there is no row at all
            raise all_held_out(name, share)
        if report is None or not report.rows:
            raise DataError(f"dataset {work.chats.name} is empty")
        found: DataReport | PromptReport = report
        return found

    def _made_of(self, product: _Product[T, F]) -> dict[str, Any] | None:
        """What a dataset's records follow from; None: a file must be read to tell."""
        files = product.work.chats.files
        digests = [self._digests.known(file) for file in files]
        if None in digests:
            return None
        columns = product.work.chats.columns
        share = self._recipe.data.held_out_share
        weight = {} if columns.weight is None else {"weight": columns.weight}
        return {
            "format": _FORMAT,
            "files": [[file.suffix, digest] for file, digest in zip(files, digests, strict=True)],
            "columns": {
                "chat": columns.chat,
                "answers": asdict(columns.answers),
                "teacher": asdict(columns.teacher),
                "text": columns.text,
                **weight,
            },
            "policy": product.policy if share is None else {**product.policy, "held_out": share},
            **self._ingredients,
        }

    def _entry(self, made_of: Mapping[str, Any]) -> Path:
        octets = json.dumps(made_of, sort_keys=True).encode()
        return self._cfg.directory / hashlib.blake2b(octets, digest_size=16).hexdigest()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else makes anything meanwhile; a process that dies gives its turn up."""
        if self._claim is not None:
            yield
            return
        with self._lock_file() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process makes token ids; waiting", extra={"directory": str(self._cfg.directory)})
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock_file(self) -> IO[str]:
        directory = self._cfg.directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return (directory / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"data.token_cache.directory: {directory} cannot be written: {error}") from error

    def _remove_unfinished(self) -> None:
        """Of processes that were killed: nobody else may make anything now."""
        for left in (*self._cfg.directory.glob("*.writing"), *self._cfg.directory.glob("*.replaced")):
            shutil.rmtree(left, ignore_errors=True)
