"""Prefill with our rows against the same without hidden states, and with SGLang's own return of them."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import finish, say, table
from benchmarks.sglang_processes import VOCABULARY_SIZE, Work, make_model, sglang_processes

_NUM_SEQUENCES, _NUM_TOKENS = 8, 512
_WARM_UP = 2
_PAUSE_S = 0.5  # SGLang's own return leaves millions of Python objects to free, on cores that the next one needs
_MODES = {"plain": "no hidden states", "rows": "our rows, in shared memory", "stock": "SGLang's return_hidden_states"}


def _work(draw: np.random.Generator) -> Work:
    """New ids each time, so that nothing comes out of the prefix cache; every position is wanted."""
    return [(draw.integers(0, VOCABULARY_SIZE, _NUM_TOKENS).tolist(), 0) for _ in range(_NUM_SEQUENCES)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=18)
    repeats = parser.parse_args().repeats
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {mode: [] for mode in _MODES}
    with (
        tempfile.TemporaryDirectory() as directory,
        sglang_processes(make_model(Path(directory)), *_MODES) as processes,
    ):
        for repeat in range(_WARM_UP + repeats):
            work = _work(draw)
            turns = list(zip(_MODES, processes, strict=True))
            for turn in draw.permutation(len(turns)):  # nobody always follows the same
                mode, process = turns[turn]
                time.sleep(_PAUSE_S)
                done = process.prefill(work)
                # Two random sequences may begin with the same token or two.
                if done.computed_tokens < 0.99 * _NUM_SEQUENCES * _NUM_TOKENS:
                    raise SystemExit(f"{mode} computed {done.computed_tokens} tokens")
                if repeat >= _WARM_UP:
                    seconds[mode].append(done.seconds)
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    # Calls of one round follow each other: their ratio drops what else the machine does.
    ratio = {
        mode: statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        for mode, values in seconds.items()
    }
    say(f"{_NUM_SEQUENCES} sequences of {_NUM_TOKENS} tokens, every row; Qwen3 of 30M parameters, float32, CPU")
    table(
        ["prefill with", "median s", "to no hidden states"],
        [[text, f"{median[mode]:.3f}", f"{ratio[mode]:.3f}"] for mode, text in _MODES.items()],
    )
    finish("sglang_hidden_states", {"seconds": median, "ratio_to_plain": ratio, "repeats": repeats})


if __name__ == "__main__":
    main()
