"""What ranks tell each other of what they have sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdmesh.types import FinishReason, Sample
from kdmesh_trainer.sources.rollouts import Episode, Turns, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank sampled for one step, as plain values."""

    lengths: tuple[int, ...]  # of the responses, or episodes, prompt by prompt
    token_ids: bytes  # of all responses, int32
    logprobs: bytes  # of all response tokens, float32
    is_cut_off: tuple[bool, ...]  # of each response
    weight_versions: tuple[int, ...]  # of each response
    turns: tuple[Turns, ...]  # of each response; empty: nobody answers them
    verdicts: tuple[Verdict, ...]  # on each response; empty: nobody judges
    digest: bytes  # of the sequences that prompts and responses make
    wait_s: float
    drawing_s: float  # from the first of them asked for, or the step before complete, to the last one here
    refusal: str  # why a server's weights are too old; empty: none has said so
    outdated: tuple[str, ...]  # addresses of servers that need newer weights, as far as the rank knows
    is_whole: bool  # else it has nothing: servers need newer weights


def share_of(
    samples: Sequence[Sample], verdicts: Sequence[Verdict], *, digest: bytes, wait_s: float, drawing_s: float
) -> Share:
    """The share of a rank that has all samples, prompt by prompt; the rest as Share has it."""
    return Share(
        lengths=tuple(sample.num_tokens for sample in samples),
        token_ids=b"".join(sample.token_ids.astype(np.int32).tobytes() for sample in samples),
        logprobs=b"".join(sample.logprobs.astype(np.float32).tobytes() for sample in samples),
        is_cut_off=tuple(sample.finish_reason is FinishReason.LENGTH for sample in samples),
        weight_versions=tuple(sample.min_weight_version for sample in samples),
        turns=tuple(sample.turns for sample in samples if isinstance(sample, Episode)),
        verdicts=tuple(verdicts),
        digest=digest,
        wait_s=wait_s,
        drawing_s=drawing_s,
        refusal="",
        outdated=(),
        is_whole=True,
    )


def nothing(*, wait_s: float, refusal: str, outdated: tuple[str, ...]) -> Share:
    """Of a rank that waits for servers to get newer weights."""
    empty = share_of([], [], digest=b"", wait_s=wait_s, drawing_s=0.0)
    return replace(empty, refusal=refusal, outdated=outdated, is_whole=False)


def samples_of(share: Share) -> list[Sample]:
    """A share's samples, but for the messages of episodes, and for how new their newest weights were."""
    ends = np.cumsum(share.lengths)[:-1]
    token_ids = np.split(np.frombuffer(share.token_ids, np.int32), ends)
    logprobs = np.split(np.frombuffer(share.logprobs, np.float32), ends)
    samples = [
        Sample(
            token_ids=token_ids[number],
            logprobs=logprobs[number],
            finish_reason=FinishReason.LENGTH if share.is_cut_off[number] else FinishReason.STOP,
            min_weight_version=version,
            max_weight_version=version,
        )
        for number, version in enumerate(share.weight_versions)
    ]
    if not share.turns:
        return samples
    return [Episode.of(sample, turns) for sample, turns in zip(samples, share.turns, strict=True)]
