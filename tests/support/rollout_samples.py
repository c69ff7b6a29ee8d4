"""Prompts to ask samples of, and the samples that the fake engine must answer with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from kdmesh.rpc.retry import Deadline
from kdmesh.rpc.rollouts.client import Ask, RolloutClient
from kdmesh.types import Int32Array, Sample, Sampling
from kdmesh_rollout.fake_engine import START_SALT, token_at


def prompt(num_tokens: int = 5, *, seed: int = 0, vocabulary_size: int = 60) -> Int32Array:
    """Random ids."""
    return np.random.default_rng(seed).integers(0, vocabulary_size, num_tokens).astype(np.int32)


def ask(prompt_ids: Int32Array, *, samples: int = 1, seed: int | None = 7, newest: int = 0, **sampling: Any) -> Ask:
    """A request; six tokens unless told otherwise."""
    return Ask(
        prompt_ids=prompt_ids,
        sampling=Sampling(**({"max_new_tokens": 6} | sampling)),
        num_samples=samples,
        seed=seed,
        min_weight_version=newest,
    )


def expected_tokens(
    prompt_ids: Int32Array, seed: int, num_tokens: int, *, salt: int = START_SALT, vocabulary_size: int = 60
) -> list[int]:
    """What the fake engine draws when nothing stops it."""
    return [
        token_at(prompt_ids, seed, place, salt=salt, vocabulary_size=vocabulary_size)[0] for place in range(num_tokens)
    ]


async def generate(
    client: RolloutClient,
    wanted: Ask,
    *,
    deadline_s: float = 10,
    on_sample: Callable[[int, Sample], None] = lambda index, sample: None,
) -> list[Sample]:
    """The samples by index."""
    samples: dict[int, Sample] = {}

    def arrive(index: int, sample: Sample) -> None:
        assert index not in samples
        samples[index] = sample
        on_sample(index, sample)

    await client.generate(wanted, arrive, Deadline.after(deadline_s))
    return [samples[index] for index in sorted(samples)]


def generating(client: RolloutClient, wanted: Ask, **options: Any) -> asyncio.Task[list[Sample]]:
    """The same, as a task."""
    return asyncio.create_task(generate(client, wanted, **options))
