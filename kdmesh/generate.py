"""Writes a chat dataset of a model's own answers, sampled by rollout servers or from teachers."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np
from jinja2 import TemplateError

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.errors import ConfigError, DataError, InvalidRequest, ModelMismatch
from kdmesh.image_files import ImageColumn, ImageFiles, ImageRules, NoImages, RowImages
from kdmesh.images import expand_images
from kdmesh.models.ends import stop_token_ids
from kdmesh.models.image_reader import load_image_reader
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.rpc.rollout_pool import RolloutPool
from kdmesh.rpc.teacher_pool import TeacherPool
from kdmesh.sampling.seeds import seed_of
from kdmesh.sampling.teacher_sampler import TeacherSampler
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import FinishReason, Image, Int32Array, PlacedImage, Sample, Sampling, VisionSpec
from kdmesh_trainer.data_config import ImagesConfig

_JOB = "generate"
_ANSWER = "that is so"
_AHEAD = 64  # prompts under way, so that the servers always have something to do
_MIB = 2**20

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask of every prompt."""

    samples: int
    sampling: Sampling  # without stop_token_ids, the tokenizer's end of sequence ends an answer
    seed: int
    keeps_cut_off: bool  # whether answers that reached the length limit are written too
    deadline_s: float  # for the answers to one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row's chat up to what the assistant shall answer."""

    origin: str  # "FILE, line N", for people
    messages: list[Message]  # as the row has them
    shown: list[Message]  # as the template takes them: an image is a part that names none
    images: tuple[Image, ...]  # in their order
    column: dict[str, Any]  # the row's column of images, if it has one


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of the prompts."""

    prompts: int = 0
    written: int = 0
    cut_off: int = 0  # answers at the length limit

    def sentence(self) -> str:
        """For a person."""
        return f"{self.written} answers to {self.prompts} prompts; {self.cut_off} reached the length limit"


class PendingAnswers(Protocol):
    """Samples of one prompt."""

    def wait(self) -> list[Sample]:
        """Block until all are here."""
        ...


class Speaker(Protocol):
    """A served model that can be sampled from."""

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        images: tuple[PlacedImage, ...],
    ) -> PendingAnswers:
        """Ask for samples of one prompt, sample i drawn from seed + i. Does not block."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Who is asked: rollout servers, or teachers, which compute an answer anew for each of its tokens."""

    kind: Literal["rollout", "teacher"]
    addresses: Sequence[str]  # as Discovery takes them; at least one
    access: AccessConfig = OPEN_ACCESS


def generate(
    servers: Servers, model: Path, prompts: Path, output: Path, plan: Plan, *, image_root: Path | None = None
) -> Report:
    """Write one row of `messages` for each answer, in the order of the prompts; blocks until all are written.

    `output` appears when it is whole.

    Args:
        servers: all of one model.
        model: directory of the tokenizer, with its chat template; it must be the servers' own.
        prompts: see read_prompts.
        output: JSONL file to write.
        plan: how answers are drawn.
        image_root: directory that paths of images are relative to; None: that of `prompts`.

    Raises:
        ConfigError: `model` has no tokenizer or no chat template, or `output` cannot be written.
        DataError: a prompt cannot be used.
        ModelMismatch: the servers have another tokenizer, or read images otherwise.
        RpcError: the servers do not answer, or refuse a prompt.
    """
    chats = ChatTokens(model)
    stops = plan.sampling.stop_token_ids or chats.ends
    plan = replace(plan, sampling=replace(plan.sampling, stop_token_ids=stops))
    unfinished = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = unfinished.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error}") from None
    report = Report()
    with ExitStack() as stack:
        stack.callback(unfinished.unlink, missing_ok=True)
        stack.enter_context(file)
        speaker = _speaker(servers, chats, plan, stack)
        asked = read_prompts(prompts, images=chats.image_column(image_root or prompts.parent))
        for row, samples in _answers(speaker, chats, asked, plan):
            report.prompts += 1
            for sample in samples:
                is_cut_off = sample.finish_reason is FinishReason.LENGTH
                report.cut_off += is_cut_off
                if plan.keeps_cut_off or not is_cut_off:
                    _write(file, row, chats.text(sample, stops))
                    report.written += 1
        file.flush()
        unfinished.replace(output)
    return report


def read_prompts(path: Path, *, images: ImageColumn) -> Iterator[Asked]:
    """The messages of each row of a JSONL file, up to what the assistant shall answer.

    A row has `messages`, whose last one is dropped when it is the assistant's, or `prompt`, a text for the user's turn.

    Raises:
        DataError: a row has neither, or an image that is not to be had, or is not JSON; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028 as it is
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _asked(line, f"{path}, line {number}", images)


class ChatTokens:
    """Messages to a prompt's ids, and an answer's ids to its text.

    Raises, when made:
        ConfigError: the directory has no tokenizer, or one without a chat template.
    """

    def __init__(self, model: Path) -> None:
        tokenizer = load_tokenizer(model) if model.is_dir() else None
        if tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer")
        if tokenizer.chat_template is None:
            raise ConfigError(f"the tokenizer in {model} has no chat template")
        self._model = model
        self._tokenizer = tokenizer
        self._reader = load_image_reader(model) if (model / "config.json").is_file() else None

    @property
    def ends(self) -> tuple[int, ...]:
        """What ends an answer, as where a trainer samples: the end of a turn, and of the model's text."""
        return stop_token_ids(self._model, self._tokenizer, self)

    def end_of_turn(self) -> int | None:
        """The special token that the template puts behind what an assistant says; None where there is none."""
        chat = [{"role": "user", "content": "what"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, TypeError, ValueError):
            return None
        _, found, behind = text.rpartition(_ANSWER)
        if not found:
            return None  # the template changes what is said
        ids = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        first = next((int(token) for token in ids if self.decode([token]).strip()), None)
        return first if first in self._tokenizer.added_tokens_decoder else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with its special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def check(self, fingerprint: str) -> None:
        """Raises ModelMismatch when a server with that fingerprint has another tokenizer."""
        ours = tokenizer_fingerprint(self._tokenizer.get_vocab())
        if fingerprint != ours:
            raise ModelMismatch(f"the servers have tokenizer {fingerprint or '(none)'}; --model has {ours}")

    def check_vision(self, vision: VisionSpec | None) -> None:
        """Read images only if the servers do. Raises ModelMismatch when those make other numbers of tokens of them."""
        if vision is None:
            self._reader = None
        elif self._reader is not None and vision.expansion != self._reader.expansion:
            raise ModelMismatch(
                "the image processors of the servers and of --model make different numbers of tokens of an image"
            )

    def image_column(self, root: Path) -> ImageColumn:
        """Where the images of rows are: in files below `root`, or in the rows; the limits are a dataset's."""
        if self._reader is None:
            return ImageColumn(source=NoImages("the servers, or the model in --model, read text alone"), name=None)
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

    def prompt(self, asked: Asked) -> tuple[Int32Array, tuple[PlacedImage, ...]]:
        """The chat so far with the beginning of the assistant's turn, and the images in it.

        Raises:
            DataError: the template refuses it, or does not write its images.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(asked.shown, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{asked.origin}: the chat template refuses {json.dumps(asked.shown)[:200]}: {error}"
            ) from None
        # The template writes the special tokens itself.
        ids = np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if self._reader is None:
            return ids, ()
        try:
            expanded_ids, _, placed = expand_images(ids, ids[:0], asked.images, self._reader)
        except InvalidRequest as error:
            raise DataError(f"{asked.origin}: {error}") from None
        return expanded_ids, placed

    def text(self, sample: Sample, stops: Sequence[int]) -> str:
        """What the assistant said, without the stop token, which the template writes."""
        ids = sample.token_ids.tolist()
        text: str = self._tokenizer.decode(
            ids[:-1] if ids[-1] in stops else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _speaker(servers: Servers, chats: ChatTokens, plan: Plan, stack: ExitStack) -> Speaker:
    """Connected until `stack` ends."""
    if servers.kind == "rollout":
        rollouts = stack.enter_context(
            RolloutPool(servers.addresses, job=_JOB, deadline_s=plan.deadline_s, access=servers.access)
        )
        chats.check(rollouts.describe().tokenizer_fingerprint)
        chats.check_vision(rollouts.describe().vision)
        return rollouts
    teachers = stack.enter_context(
        TeacherPool(
            servers.addresses,
            job=_JOB,
            deadline_s=plan.deadline_s,
            uses_cache=False,  # nobody asks again for the row of half an answer
            access=servers.access,
        )
    )
    chats.check(teachers.describe().tokenizer_fingerprint)
    chats.check_vision(teachers.describe().vision)
    return TeacherSampler(teachers, chats.decode)


def _answers(
    speaker: Speaker, chats: ChatTokens, asked: Iterable[Asked], plan: Plan
) -> Iterator[tuple[Asked, list[Sample]]]:
    """Each prompt with its samples, in order; later prompts are being answered meanwhile."""
    waiting: deque[tuple[Asked, PendingAnswers]] = deque()
    for number, row in enumerate(asked):
        seed = seed_of("generate", plan.seed, number)
        ids, images = chats.prompt(row)
        pending = speaker.submit(ids, plan.sampling, num_samples=plan.samples, seed=seed, images=images)
        waiting.append((row, pending))
        if len(waiting) > _AHEAD:
            first, pending = waiting.popleft()
            yield first, pending.wait()
    for row, pending in waiting:
        yield row, pending.wait()


def _asked(line: str, place: str, images: ImageColumn) -> Asked:
    row, messages = _row(line, place)
    found = RowImages(images, row, place)
    pictures: list[Image] = []

    def shown(message: Message, number: int) -> Message:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts: list[object] = []
        for part in content:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                pictures.append(found.of_part(part, f"{place}: messages[{number}]"))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        return {**message, "content": parts}

    told = [shown(message, number) for number, message in enumerate(messages)]
    found.check_all_used()
    column = {images.name: row[images.name]} if images.name is not None and row.get(images.name) else {}
    return Asked(origin=place, messages=messages, shown=told, images=tuple(pictures), column=column)


def _row(line: str, place: str) -> tuple[dict[str, Any], list[Message]]:
    """A row, and its messages without an answer at their end."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from None
    prompt, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(prompt, str):
        return row, [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place} has neither `messages`, a list of turns, nor `prompt`, a text")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f"{place} has no turn to answer")
    return row, messages


def _write(file: TextIO, asked: Asked, answer: str) -> None:
    messages = [*asked.messages, {"role": "assistant", "content": answer}]
    file.write(json.dumps({"messages": messages, **asked.column}, ensure_ascii=False) + "\n")
