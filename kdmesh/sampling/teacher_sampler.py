"""Samples from a teacher through its rows alone, token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from kdmesh.errors import InvalidRequest, ModelMismatch
from kdmesh.losses.workspace import Workspace
from kdmesh.rpc.teachers.needs import Needs
from kdmesh.rpc.teachers.pool import TeacherPool
from kdmesh.sampling.drawing import draw
from kdmesh.sampling.growing import GrowingSample
from kdmesh.sampling.logits import sampling_logits
from kdmesh.sampling.stops import StopStrings
from kdmesh.types import Int32Array, PlacedImage, Sample, Sampling, TokenSequence

_TOGETHER = 256  # samples that get their next token at the same time
_NEXT = 0  # stands behind the tokens so far, because a sequence's last one is never a position


class TeacherSampler:
    """Asks a teacher for the row behind each unfinished sample, and draws the next token from it with the head.

    To the teacher these are requests like any other, so that its queue and its limits hold for them. It keeps nothing
    between two tokens: an engine without a prefix cache computes the whole sequence for each. Belongs to one thread.
    """

    def __init__(self, pool: TeacherPool, decode: Callable[[Sequence[int]], str]) -> None:
        """
        Args:
            decode: ids to text, special tokens included.
        """
        self._pool = pool
        self._decode = decode
        head, self._version = pool.head()
        self._head = head.sliced(pool.describe().head.vocabulary_size)
        self._longest = min(pool.describe().max_sequence_tokens, pool.describe().max_request_tokens)
        pool.require(Needs.of(tokens=self._longest))
        self._workspace = Workspace()
        vision = pool.describe().vision
        # An image token without an image is nothing that a sequence may hold.
        self._never = None if vision is None else vision.image_token_id
        self._waiting: deque[GrowingSample] = deque()
        self._running: list[GrowingSample] = []
        self._finished: dict[int, Sample] = {}
        self._num_samples = 0

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        images: tuple[PlacedImage, ...] = (),
    ) -> TeacherSamples:
        """Samples of one prompt, sample i drawn from seed + i; drawn while any are waited for.

        Raises:
            InvalidRequest: the prompt leaves no room for a token.
        """
        if len(prompt_ids) >= self._longest:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens; with a response, the teacher takes at most {self._longest}"
            )
        keys = range(self._num_samples, self._num_samples + num_samples)
        self._num_samples += num_samples
        for number, key in enumerate(keys):
            stops = StopStrings(sampling.stop_strings, self._decode)
            sample = GrowingSample(
                key,
                prompt_ids,
                sampling=sampling,
                seed=(seed + number) % 2**64,
                max_sequence_tokens=self._longest,
                stops=stops,
                images=images,
            )
            self._waiting.append(sample)
        return TeacherSamples(self, keys)

    def finish(self, key: int) -> Sample:
        """Draw until that sample is finished; it is forgotten then.

        Raises:
            ModelMismatch: the teacher got other weights.
            RpcError: it did not answer.
        """
        while key not in self._finished:
            self._step()
        return self._finished.pop(key)

    def _step(self) -> None:
        """One more token of everything under way."""
        while self._waiting and len(self._running) < _TOGETHER:
            self._running.append(self._waiting.popleft())
        rows = self._pool.submit([_sequence(sample) for sample in self._running]).wait()
        if rows.weight_version != self._version:
            raise ModelMismatch(
                f"the teacher has weight version {rows.weight_version} now; its head was of {self._version}"
            )
        logits_BV = sampling_logits(self._head, rows.rows_RD, self._workspace)
        draws = [sample.draw(logits_BV.device) for sample in self._running]
        tokens, logprobs = draw(logits_BV, draws, never=self._never)
        unfinished = []
        for sample, token, logprob in zip(self._running, tokens, logprobs, strict=True):
            outcome = sample.take(token, logprob, version=self._version)
            if outcome is None:
                unfinished.append(sample)
            else:
                self._finished[sample.key] = outcome
        self._running = unfinished


class TeacherSamples:
    """The samples of one prompt."""

    def __init__(self, sampler: TeacherSampler, keys: Sequence[int]) -> None:
        self._sampler = sampler
        self._keys = keys

    def wait(self) -> list[Sample]:
        """All of them, by seed. Blocks; see TeacherSampler.finish."""
        return [self._sampler.finish(key) for key in self._keys]


def _sequence(sample: GrowingSample) -> TokenSequence:
    ids = sample.sequence_ids
    return TokenSequence(
        token_ids=np.append(ids, np.int32(_NEXT)),
        positions=np.array([len(ids) - 1], np.int32),
        images=sample.images,
    )
