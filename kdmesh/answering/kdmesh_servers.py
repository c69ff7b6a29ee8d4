"""Answers of rollout servers, or of teachers: ids are sent, and ids come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from kdmesh.answering.answer_report import Counts
from kdmesh.answering.chat_tokens import ChatTokens
from kdmesh.answering.prompt_rows import Asked
from kdmesh.answering.source import Answers, Plan
from kdmesh.auth.config import AccessConfig
from kdmesh.chats.image_files import ImageColumn
from kdmesh.errors import DataError
from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.sampling.seeds import seed_of
from kdmesh.sampling.stops import before_stop
from kdmesh.sampling.teacher_sampler import TeacherSampler
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling

_JOB = "generate"
_AHEAD = 64  # prompts under way, so that the servers always have something to do
_CONNECT_S = 30.0  # an address where nobody is, is best told at once


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
class KdmeshServers:
    """Rollout servers, or teachers, which compute an answer anew for each of its tokens; all of one model."""

    kind: Literal["rollout", "teacher"]
    addresses: Sequence[str]  # as Discovery takes them; at least one
    model: Path  # directory of the tokenizer, with its chat template; it must be the servers' own
    access: AccessConfig

    @contextmanager
    def opened(self, plan: Plan, image_root: Path) -> Iterator[TokenAnswers]:
        """See Servers.

        Raises:
            ConfigError: `model` has no tokenizer or no chat template.
            ModelMismatch: the servers have another tokenizer, or read images otherwise.
        """
        chats = ChatTokens(self.model, plan.template_settings)
        with ExitStack() as stack:
            served = _connect(self, chats, plan.deadline_s, stack)
            yield TokenAnswers(served, chats, plan, chats.image_column(image_root))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    speaker: Speaker
    longest: int  # tokens of prompt and response together
    facts: dict[str, Any]  # what tells the model from others


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    asked: Asked
    num_prompt_tokens: int
    samples: PendingAnswers


class TokenAnswers:
    """See AnswerSource. Answers come in the order of the prompts."""

    def __init__(self, served: _Served, chats: ChatTokens, plan: Plan, images: ImageColumn) -> None:
        self.images = images
        self._served = served
        self._chats = chats
        self._plan = plan
        self._sampling = replace(plan.sampling, stop_token_ids=plan.sampling.stop_token_ids or chats.ends)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See AnswerSource."""
        return {"model": self._chats.digest, "servers": self._served.facts, "sampling": asdict(self._sampling)}

    def check(self, asked: Asked) -> None:
        """See AnswerSource."""
        ids, _ = self._chats.prompt(asked)
        if len(ids) >= self._served.longest:
            raise DataError(
                f"{asked.origin}: the prompt has {len(ids)} tokens; with a response, the servers take at most "
                f"{self._served.longest}"
            )

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answers]]:
        """See AnswerSource."""
        waiting: deque[_Pending] = deque()
        for one in asked:
            waiting.append(self._submit(one))
            if len(waiting) > _AHEAD:
                yield self._answered(waiting.popleft())
        for pending in waiting:
            yield self._answered(pending)

    def _submit(self, asked: Asked) -> _Pending:
        ids, images = self._chats.prompt(asked)
        samples = self._served.speaker.submit(
            ids,
            self._sampling,
            num_samples=self._plan.samples,
            seed=seed_of("generate", self._plan.seed, asked.number),
            images=images,
        )
        return _Pending(asked=asked, num_prompt_tokens=len(ids), samples=samples)

    def _answered(self, pending: _Pending) -> tuple[Asked, Answers]:
        samples = pending.samples.wait()
        cut_off = sum(sample.finish_reason is FinishReason.LENGTH for sample in samples)
        wanted = [s for s in samples if self._plan.keeps_cut_off or s.finish_reason is not FinishReason.LENGTH]
        said = [self._chats.text(sample, self._sampling.stop_token_ids) for sample in wanted]
        texts = [before_stop(text, self._sampling.stop_strings) for text in said]
        turns = [{"role": "assistant", "content": text} for text in texts if text.strip()]
        counts = Counts(
            cut_off=cut_off,
            blank=len(texts) - len(turns),
            prompt_tokens=pending.num_prompt_tokens,
            completion_tokens=sum(sample.num_tokens for sample in samples),
        )
        return pending.asked, Answers(turns=turns, counts=counts)


def _connect(servers: KdmeshServers, chats: ChatTokens, deadline_s: float, stack: ExitStack) -> _Served:
    """Connected until `stack` ends."""
    if servers.kind == "rollout":
        rollouts = stack.enter_context(
            RolloutPool(
                servers.addresses,
                job=_JOB,
                deadline_s=deadline_s,
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
            deadline_s=deadline_s,
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
