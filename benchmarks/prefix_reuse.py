"""Several samples of each prompt, scored with and without SGLang's prefix cache."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import finish, say, table
from benchmarks.sglang_processes import VOCABULARY_SIZE, Prefilled, Work, make_model, sglang_processes

_SAMPLES, _PROMPT_TOKENS, _RESPONSE_TOKENS, _PROMPTS = 8, 512, 64, 2
_WARM_UP = 1
_MODES = {"rows-uncached": "off", "rows": "on"}


def _work(draw: np.random.Generator) -> Work:
    """New prompts each time; rows from the last token of the prompt on, as a trainer wants them."""
    work = []
    for _ in range(_PROMPTS):
        prompt = draw.integers(0, VOCABULARY_SIZE, _PROMPT_TOKENS).tolist()
        for _ in range(_SAMPLES):
            response = draw.integers(0, VOCABULARY_SIZE, _RESPONSE_TOKENS).tolist()
            work.append((prompt + response, _PROMPT_TOKENS - 1))
    return work


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    draw = np.random.default_rng(0)
    calls: dict[str, list[Prefilled]] = {mode: [] for mode in _MODES}
    with (
        tempfile.TemporaryDirectory() as directory,
        sglang_processes(make_model(Path(directory)), *_MODES) as processes,
    ):
        for _ in range(_WARM_UP + repeats):
            work = _work(draw)
            for mode, process in zip(_MODES, processes, strict=True):
                calls[mode].append(process.prefill(work))
    measured = {mode: values[_WARM_UP:] for mode, values in calls.items()}
    seconds = {mode: statistics.median(call.seconds for call in values) for mode, values in measured.items()}
    tokens = {mode: statistics.median(call.computed_tokens for call in values) for mode, values in measured.items()}
    say(
        f"{_PROMPTS} prompts of {_PROMPT_TOKENS} tokens, {_SAMPLES} samples of {_RESPONSE_TOKENS} tokens each; "
        "Qwen3 of 30M parameters, float32, CPU"
    )
    table(
        ["prefix cache", "computed tokens", "median s"],
        [[text, f"{tokens[mode]:.0f}", f"{seconds[mode]:.3f}"] for mode, text in _MODES.items()],
    )
    figures = {
        "fewer_tokens": tokens["rows-uncached"] / tokens["rows"],
        "faster": statistics.median(
            off.seconds / on.seconds for off, on in zip(measured["rows-uncached"], measured["rows"], strict=True)
        ),
    }
    say(f"{figures['fewer_tokens']:.2f} times fewer tokens, {figures['faster']:.2f} times faster")
    finish("prefix_reuse", {"seconds": seconds, "computed_tokens": tokens, **figures, "repeats": repeats})


if __name__ == "__main__":
    main()
