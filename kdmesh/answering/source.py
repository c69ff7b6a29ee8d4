"""What a served model is asked, and what it answers, whoever serves it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdmesh.answering.answer_report import Counts
from kdmesh.answering.prompt_rows import Asked
from kdmesh.chats.chat_template import TemplateSetting
from kdmesh.chats.image_files import ImageColumn, ImageFiles, ImageRules
from kdmesh.types import Sampling
from kdmesh_trainer.sections.data_config import ImagesConfig

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask of every prompt."""

    samples: int
    sampling: Sampling  # without stop_token_ids, the model's own end of sequence ends an answer
    seed: int
    keeps_cut_off: bool  # whether answers that reached the length limit are written too
    deadline_s: float  # for the answers to one prompt
    template_settings: Mapping[str, TemplateSetting] = field(default_factory=dict)  # see with_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """To one prompt."""

    turns: Sequence[Mapping[str, Any]]  # of the assistant, one for each answer that is wanted, as rows have them
    counts: Counts


class AnswerSource(Protocol):
    """A served model that answers chats."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that its answers follow from, beside prompts, samples and seed, as JSON takes it."""
        ...

    @property
    def images(self) -> ImageColumn:
        """Where it finds the images of rows."""
        ...

    def check(self, asked: Asked) -> None:
        """Raises DataError when it cannot be asked this."""
        ...

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answers]]:
        """Each prompt with its answers, in any order; others are being answered meanwhile.

        Raises:
            RpcError: the servers do not answer, or refuse a prompt.
        """
        ...


class Servers(Protocol):
    """Who is asked."""

    def opened(self, plan: Plan, image_root: Path) -> AbstractContextManager[AnswerSource]:
        """Connected inside.

        Args:
            image_root: directory that paths of images are relative to.

        Raises:
            ConfigError: they cannot be asked so.
            RpcError: they do not answer, or are others than they should be.
        """
        ...


def image_column(root: Path) -> ImageColumn:
    """Images in files below `root`, or in the rows; the limits are a dataset's."""
    limits = ImagesConfig()
    rules = ImageRules(
        root=root,
        allow_urls=False,
        max_bytes=int(limits.max_mib * _MIB),
        max_pixels=limits.max_pixels,
        root_key="--image-root",
        why_no_urls="nothing is fetched here",
    )
    return ImageColumn(source=ImageFiles(rules), name=limits.column)
