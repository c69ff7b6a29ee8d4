"""Writes a chat dataset of a model's own answers, sampled by rollout servers or from teachers."""

from __future__ import annotations

import hashlib
import json
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import click
import numpy as np

from kdmesh.answer_report import Report
from kdmesh.auth.config import OPEN_ACCESS, AccessConfig
from kdmesh.chat_template import TEMPLATE_ERRORS, TemplateSetting, dated_alike, with_settings
from kdmesh.counting import Pace, Show, clock, counted
from kdmesh.errors import ConfigError, DataError, InvalidRequest, KdmeshError, ModelMismatch
from kdmesh.image_files import ImageColumn, ImageFiles, ImageRules, NoImages
from kdmesh.images import expand_images
from kdmesh.kept_answers import KeptAnswers, kept_answers
from kdmesh.local import Stopped
from kdmesh.models.ends import stop_token_ids
from kdmesh.models.image_reader import load_image_reader
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.outputs import refuse_own_input
from kdmesh.prompt_rows import Asked, Prompts
from kdmesh.rpc.rollout_pool import RolloutPool
from kdmesh.rpc.teacher_pool import TeacherPool
from kdmesh.sampling.seeds import seed_of
from kdmesh.sampling.stops import before_stop
from kdmesh.sampling.teacher_sampler import TeacherSampler
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.tool_rows import are_written
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling, VisionSpec
from kdmesh_trainer.data_config import ImagesConfig

_JOB = "generate"
_ANSWER = "that is so"
_AHEAD = 64  # prompts under way, so that the servers always have something to do
_MIB = 2**20
_CONNECT_S = 30.0  # an address where nobody is, is best told at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to ask of every prompt."""

    samples: int
    sampling: Sampling  # without stop_token_ids, the tokenizer's end of sequence ends an answer
    seed: int
    keeps_cut_off: bool  # whether answers that reached the length limit are written too
    deadline_s: float  # for the answers to one prompt
    template_settings: Mapping[str, TemplateSetting] = field(default_factory=dict)  # see with_settings


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    speaker: Speaker
    longest: int  # tokens of prompt and response together
    facts: dict[str, Any]  # what tells the model from others


def generate(
    servers: Servers, model: Path, prompts: Path, output: Path, plan: Plan, *, image_root: Path | None = None
) -> Report:
    """Write one row of `messages` for each answer, in the order of the prompts; blocks until all are written.

    Every prompt is read and rendered before the first is sent. `output` appears when it is whole; until then the
    answers are kept beside it (see kdmesh/kept_answers.py), and the same call goes on behind them.

    Args:
        servers: all of one model.
        model: directory of the tokenizer, with its chat template; it must be the servers' own.
        prompts: see Prompts.
        output: JSONL file to write.
        plan: how answers are drawn.
        image_root: directory that paths of images are relative to; None: that of `prompts`.

    Raises:
        ConfigError: `model` has no tokenizer or no chat template, `output` is `prompts` or cannot be written, or the
            answers kept beside it are to something else.
        DataError: a prompt cannot be used.
        ModelMismatch: the servers have another tokenizer, or read images otherwise.
        RpcError: the servers do not answer, or refuse a prompt.
        KdmeshError: there is no answer to write.
        Stopped: Ctrl-C, once the first prompt was sent.
    """
    refuse_own_input(output, {"--prompts": prompts})
    chats = ChatTokens(model, plan.template_settings)
    stops = plan.sampling.stop_token_ids or chats.ends
    plan = replace(plan, sampling=replace(plan.sampling, stop_token_ids=stops))
    root = image_root or prompts.parent
    with ExitStack() as stack:
        kept = stack.enter_context(kept_answers(output))
        served = _connect(servers, chats, plan, stack)
        rows = Prompts(prompts)
        column = chats.image_column(root)
        _check(rows, column, chats, served)
        kept.resume(
            {
                "prompts": rows.digest,
                "image_root": str(root),
                "model": chats.digest,
                "servers": served.facts,
                "samples": plan.samples,
                "seed": plan.seed,
                "keep_cut_off": plan.keeps_cut_off,
                "keep_blank": False,
                "sampling": asdict(plan.sampling),
            }
        )
        with _kept_told(kept), counted("prompts", elsewhere=_say("prompts answered")) as show:
            pace = Pace(done=kept.prompts, total=len(rows))
            show(kept.prompts, len(rows), None)
            asked = enumerate(rows.rows(column, begin=kept.prompts), start=kept.prompts)
            for row, samples in _answers(served.speaker, chats, asked, plan):
                cut_off = sum(sample.finish_reason is FinishReason.LENGTH for sample in samples)
                wanted = [s for s in samples if plan.keeps_cut_off or s.finish_reason is not FinishReason.LENGTH]
                texts = [before_stop(chats.text(sample, stops), plan.sampling.stop_strings) for sample in wanted]
                said = [_answered(row, text) for text in texts if text.strip()]
                kept.add(said, cut_off=cut_off, blank=len(texts) - len(said))
                show(kept.prompts, len(rows), pace.left_s(kept.prompts))
        report = Report(prompts=kept.prompts, written=kept.written, cut_off=kept.cut_off, blank=kept.blank)
        if not report.written:
            kept.is_needed = False
            raise KdmeshError(f"{output} is not written: {report.why_nothing(keeps_cut_off=plan.keeps_cut_off)}")
        kept.publish(output)
        return report


class ChatTokens:
    """Messages to a prompt's ids, and an answer's ids to its text.

    Raises, when made:
        ConfigError: the directory has no tokenizer, or one without a chat template, or without what is to be set in it.
    """

    def __init__(self, model: Path, template_settings: Mapping[str, TemplateSetting] | None = None) -> None:
        tokenizer = load_tokenizer(model) if model.is_dir() else None
        if tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(f"the tokenizer in {model} has no chat template") from None
        self._template = dated_alike(with_settings(template, template_settings or {}, key="--template-setting"))
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
            text = str(self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False))
        except TEMPLATE_ERRORS:
            return None
        _, found, behind = text.rpartition(_ANSWER)
        if not found:
            return None  # the template changes what is said
        ids = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        first = next((int(token) for token in ids if self.decode([token]).strip()), None)
        return first if first in self._tokenizer.added_tokens_decoder else None

    @property
    def digest(self) -> str:
        """Of all that turns messages into ids."""
        words = f"{tokenizer_fingerprint(self._tokenizer.get_vocab())} {self._template}"
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

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
            text: str = self._tokenizer.apply_chat_template(
                asked.shown,
                tools=[dict(tool) for tool in asked.tools] or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"{asked.origin}: the chat template refuses {json.dumps(asked.shown)[:200]}: {error}"
            ) from None
        if not are_written((*asked.tools, *asked.calls), text):
            raise DataError(f"{asked.origin}: the chat template leaves out its tools, or calls of them")
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


def _connect(servers: Servers, chats: ChatTokens, plan: Plan, stack: ExitStack) -> _Served:
    """Connected until `stack` ends."""
    if servers.kind == "rollout":
        rollouts = stack.enter_context(
            RolloutPool(
                servers.addresses,
                job=_JOB,
                deadline_s=plan.deadline_s,
                access=servers.access,
                connect_s=_CONNECT_S,
            )
        )
        sampled = rollouts.describe()
        chats.check(sampled.tokenizer_fingerprint)
        chats.check_vision(sampled.vision)
        facts = {"model": sampled.name, "weight_version": sampled.weight_version}
        return _Served(speaker=rollouts, longest=sampled.max_sequence_tokens, facts={"kind": "rollout", **facts})
    teachers = stack.enter_context(
        TeacherPool(
            servers.addresses,
            job=_JOB,
            deadline_s=plan.deadline_s,
            uses_cache=False,  # nobody asks again for the row of half an answer
            access=servers.access,
            connect_s=_CONNECT_S,
        )
    )
    model = teachers.describe()
    chats.check(model.tokenizer_fingerprint)
    chats.check_vision(model.vision)
    return _Served(
        speaker=TeacherSampler(teachers, chats.decode),
        longest=min(model.max_sequence_tokens, model.max_request_tokens),
        facts={"kind": "teacher", "model": model.model_fingerprint, "weight_version": model.weight_version},
    )


def _check(rows: Prompts, column: ImageColumn, chats: ChatTokens, served: _Served) -> None:
    """Raises DataError when a prompt cannot be used: before any is answered, not after hours."""
    with counted("prompts read", elsewhere=_say("prompts read")) as show:
        pace = Pace(done=0, total=len(rows))
        for number, row in enumerate(rows.rows(column), start=1):
            ids, _ = chats.prompt(row)
            if len(ids) >= served.longest:
                raise DataError(
                    f"{row.origin}: the prompt has {len(ids)} tokens; with a response, the servers take at most "
                    f"{served.longest}"
                )
            show(number, len(rows), pace.left_s(number))


def _answers(
    speaker: Speaker, chats: ChatTokens, asked: Iterable[tuple[int, Asked]], plan: Plan
) -> Iterator[tuple[Asked, list[Sample]]]:
    """Each of the numbered prompts with its samples, in order; later ones are being answered meanwhile."""
    waiting: deque[tuple[Asked, PendingAnswers]] = deque()
    for number, row in asked:
        seed = seed_of("generate", plan.seed, number)
        ids, images = chats.prompt(row)
        pending = speaker.submit(ids, plan.sampling, num_samples=plan.samples, seed=seed, images=images)
        waiting.append((row, pending))
        if len(waiting) > _AHEAD:
            first, pending = waiting.popleft()
            yield first, pending.wait()
    for row, pending in waiting:
        yield row, pending.wait()


@contextmanager
def _kept_told(kept: KeptAnswers) -> Iterator[None]:
    """Say what is gone on with, and what is kept when it fails."""
    if kept.prompts:
        _tell(f"Going on behind {kept.prompts:,} prompts, whose answers are in {kept.path}.")
    try:
        yield
    except (KdmeshError, KeyboardInterrupt) as error:
        if kept.prompts:
            _tell(
                f"The answers to {kept.prompts:,} prompts are kept in {kept.path}; the same command goes on from there."
            )
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(error.signum if isinstance(error, Stopped) else signal.SIGINT) from None
        raise


def _say(what: str) -> Show:
    def say(done: int, total: int, left_s: float | None) -> None:
        _tell(f"{done:,} of {total:,} {what}" + ("" if left_s is None else f", {clock(left_s)} left"))

    return say


def _tell(sentence: str) -> None:
    click.echo(sentence, err=True)


def _answered(asked: Asked, answer: str) -> dict[str, Any]:
    """The row of an answer."""
    messages = [*asked.messages, {"role": "assistant", "content": answer}]
    return {"messages": messages, **asked.columns}
