"""A rollout service in this process: a real model that is sampled token by token, each sample alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kdmesh.errors import ModelMismatch
from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.packing import pack
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling, TokenSequence
from kdmesh_trainer.student.model import Student, release


class LocalStudent:
    """A copy of the student that samples; it is also the publisher that brings the weights there."""

    def __init__(self, path: Path, *, vocabulary_size: int, served: int = 0) -> None:
        """`served` is the weight version it starts with."""
        self._lm = load_causal_lm(path, torch.float32, torch.device("cpu"))
        self._vocabulary_size = vocabulary_size
        self._student: Student | None = None
        self._lock = threading.Lock()
        self._newest = self.version = served
        self.published: list[tuple[int, int]] = []  # weight version, steps done

    def follow(self, student: Student) -> None:
        """Take the weights from `student` from now on."""
        self._student = student

    def publish(self, *, version: int) -> None:
        """Have the student as it is now. What is being sampled is finished first."""
        self._newest += 1
        self.catch_up(())
        self.published.append((self.version, version))

    behind: frozenset[str] = frozenset()

    def catch_up(self, among: Collection[str]) -> None:
        """Have the student under the same number as before."""
        assert self._student is not None
        release(self._student)
        whole = {name: weight.whole(None) for name, weight in self._student.weights().items()}
        with self._lock:
            self._lm.load_state_dict(whole)
            self.version = self._newest

    def weight_version(self, version: int) -> int:
        """The newest."""
        assert self.published[-1] == (self._newest, version)
        return self._newest

    def sample(self, prompt_ids: Int32Array, sampling: Sampling, *, seed: int, min_weight_version: int = 0) -> Sample:
        """One sample, a pure function of weights, prompt and seed."""
        with self._lock:
            if self.version < min_weight_version:
                raise ModelMismatch(f"weight version {self.version} is served, {min_weight_version} is wanted")
            return self._draw(prompt_ids, sampling, seed)

    @torch.no_grad()
    def _draw(self, prompt_ids: Int32Array, sampling: Sampling, seed: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        tokens, logprobs = prompt_ids.tolist(), []
        reason = FinishReason.LENGTH
        for _ in range(sampling.max_new_tokens):
            log_q_V = self._next_log_probabilities(tokens)
            scaled_V = (log_q_V / sampling.temperature).softmax(-1) if sampling.temperature else log_q_V
            token = (
                int(torch.multinomial(scaled_V, 1, generator=generator))
                if sampling.temperature
                else int(log_q_V.argmax())
            )
            tokens.append(token)
            logprobs.append(float(log_q_V[token]))
            if token in sampling.stop_token_ids:
                reason = FinishReason.STOP
                break
        return Sample(
            token_ids=np.array(tokens[len(prompt_ids) :], np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish_reason=reason,
            min_weight_version=self.version,
            max_weight_version=self.version,
        )

    def _next_log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        last = len(tokens) - 1
        # A token more, because a sequence's last one is never a position; causal attention does not see it.
        sequence = TokenSequence(token_ids=np.array([*tokens, 0], np.int32), positions=np.array([last], np.int32))
        packed = pack([sequence])
        hidden_1D = hidden_states_TD(self._lm, packed).index_select(0, packed.rows_R)
        return output_head(self._lm).logits(hidden_1D)[0, : self._vocabulary_size].log_softmax(-1)


class Ready:
    """Samples that are computed when they are asked for, or when they are waited for."""

    def __init__(self, call: Callable[[], list[Sample]], *, is_eager: bool) -> None:
        self._call = call
        self._samples = call() if is_eager else None

    @property
    def is_done(self) -> bool:
        return self._samples is not None

    def wait(self) -> list[Sample]:
        return self._call() if self._samples is None else self._samples


class FastRollouts:
    """Samples at once, from the oldest weights it may use: what a slow trainer sees."""

    is_eager = True

    def __init__(self, student: LocalStudent) -> None:
        self.student = student
        self.seeds: list[int] = []
        self.noted: list[int] = []  # weight versions

    def wait(self, pending: Iterable[object]) -> bool:
        """No server ever comes back."""
        return True

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        """Remember."""
        self.noted.append(version)

    def outdated(self) -> frozenset[str]:
        """No server is known by an address."""
        return frozenset()

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...] = (),
        on_sample: Callable[[Sample], None],
    ) -> Ready:
        """Ready samples."""
        self.seeds.append(seed)

        def draw() -> list[Sample]:
            samples = []
            for i in range(num_samples):
                sample = self.student.sample(prompt_ids, sampling, seed=seed + i, min_weight_version=min_weight_version)
                samples.append(sample)
                on_sample(sample)
            return samples

        return Ready(draw, is_eager=self.is_eager)


class SlowRollouts(FastRollouts):
    """Begins only when it is waited for, from the newest weights there are: what a fast trainer sees."""

    is_eager = False


class Arriving:
    """Samples that a thread computes."""

    def __init__(self, future: Future[list[Sample]]) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def wait(self) -> list[Sample]:
        return self._future.result()


class ThreadedRollouts(FastRollouts):
    """Samples in threads, in whatever order they come to it."""

    def __init__(self, student: LocalStudent, threads: ThreadPoolExecutor) -> None:
        super().__init__(student)
        self._threads = threads

    def submit(  # type: ignore[override]
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...] = (),
        on_sample: Callable[[Sample], None],
    ) -> Arriving:
        """Samples on their way."""
        ask = super().submit
        return Arriving(
            self._threads.submit(
                lambda: ask(
                    prompt_ids,
                    sampling,
                    num_samples=num_samples,
                    seed=seed,
                    min_weight_version=min_weight_version,
                    on_sample=on_sample,
                ).wait()
            )
        )
