"""SGLang engines side by side, for benchmarks that measure them in turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

_STANDIN = Path(__file__).parents[1] / "tests/support/sglang_standin"
VOCABULARY_SIZE = 8192

Work = Sequence[tuple[list[int], int]]
"""Token ids and the first wanted position of each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """One call."""

    seconds: float
    computed_tokens: int


class SglangProcess:
    """One of benchmarks.sglang_child."""

    def __init__(self, mode: str, model: Path) -> None:
        paths = [str(_STANDIN), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sglang_child", mode, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SGLANG_USE_CPU_ENGINE": "1"},
        )
        self._answer()

    def prefill(self, work: Work) -> Prefilled:
        """Compute, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return Prefilled(**self._answer())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an SGLang engine ended; run this in the environment of `make sglang-env`")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextlib.contextmanager
def sglang_processes(model: Path, *modes: str) -> Iterator[list[SglangProcess]]:
    """One for each mode, ready."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(SglangProcess(mode, model))) for mode in modes]


def make_model(directory: Path) -> Path:
    """A random Qwen3 of 30M parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory
