"""What a job is trained on: one dataset, or a blend of several, in memory or in the files of a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kdmesh.types import TokenSequence
from kdmesh_trainer.data.blend import Blended, Part
from kdmesh_trainer.data.encoding.recipe import Encoder
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.files.held_out_rows import held_out_reader, trained_reader
from kdmesh_trainer.data.files.readers import ChatFiles, Reader
from kdmesh_trainer.data.kept.token_cache import TokenCache
from kdmesh_trainer.data.prompts import PromptPolicy, QuestionOf, load_prompts
from kdmesh_trainer.data.sequences import load_sequences
from kdmesh_trainer.sections.data_config import Blend, DataConfig, DatasetConfig

T = TypeVar("T")


class TrainingData:
    """The chats of `data.train` that are trained on, of which nothing is read until sequences or prompts are asked for.

    Attributes:
        cache: where token ids lie; None: in memory.
    """

    def __init__(
        self,
        data: DataConfig,
        encoder: Encoder,
        cache: TokenCache | None,
        read: Callable[[DatasetConfig], Reader],
    ) -> None:
        """`read` opens a dataset."""
        self._data = data
        self._share = data.held_out_share
        self._encoder = encoder
        self.cache = cache
        self._readers = {name: read(dataset) for name, dataset in data.train_datasets.items()}

    def sequences(self) -> Sequence[TokenSequence]:
        """Those of all chats. Raises DataError as load_sequences, and TokenCache."""
        return self._each(self._sequences)

    def prompts(self, policy: PromptPolicy, question_of: QuestionOf | None = None) -> Sequence[Prompt]:
        """Those of all chats. Raises DataError as load_prompts, and TokenCache, which keeps no questions."""
        return self._each(lambda name, reader: self._prompts(name, reader, policy, question_of))

    def held_out(self) -> dict[str, Reader]:
        """The rows of all datasets that are judged instead of trained on, by an empty name; no entry: none are."""
        return {} if self._share is None else {"": held_out_reader(list(self._readers.values()), self._share)}

    def _each(self, get: Callable[[str, Reader], Sequence[T]]) -> Sequence[T]:
        if not isinstance(self._data.train, Blend):
            return get("train", self._readers[""])
        return Blended(
            [
                Part(name=name, weight=weight, items=get(f"train.{name}", self._readers[name]))
                for name, weight in self._data.train.shares.items()
            ]
        )

    def _sequences(self, name: str, reader: Reader) -> Sequence[TokenSequence]:
        if self.cache is None:
            return load_sequences(name, self._trained(name, reader), self._encoder, self._data).sequences
        assert isinstance(reader, ChatFiles)  # the configuration's
        return self.cache.sequences(name, reader)

    def _prompts(
        self, name: str, reader: Reader, policy: PromptPolicy, question_of: QuestionOf | None
    ) -> Sequence[Prompt]:
        if self.cache is None:
            return load_prompts(name, self._trained(name, reader), self._encoder, policy, question_of).prompts
        assert question_of is None  # the configuration's
        assert isinstance(reader, ChatFiles)
        return self.cache.prompts(name, reader, policy)

    def _trained(self, name: str, reader: Reader) -> Reader:
        """Without the rows that are held out."""
        return reader if self._share is None else trained_reader(name, reader, self._share)
