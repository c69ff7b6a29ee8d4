"""Where a step of the student goes on a CPU, and what compiled layers, checkpoints and moments of 8 bits do to it.

One process, one micro-batch of the trainer's own parts, with random weights, and rows of a teacher that are here
already: nobody is waited for. The choices take turns, each micro-batch has sequences of other lengths, and seconds are
those of the process on all its cores, which other programs on the machine change less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig

from benchmarks.loss_inputs import measured_dtype
from benchmarks.measure import finish, say, table
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, fused_linear_divergence
from kdmesh.models.body import load_causal_lm
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.student.compiled_layers import compile_layers
from kdmesh_trainer.student.model import Student, begin_micro_batch, checkpoint_activations, shard

_TEACHER_SIZE = 768
_MODEL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
_WARM_UP = 2  # steps of each choice: the first compiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to have a student."""

    name: str
    dtype: torch.dtype = torch.float32
    is_compiled: bool = False
    is_checkpointed: bool = False
    moments: Literal["float32", "8bit"] = "float32"


_CHOICES = (
    Choice(name="float32"),
    Choice(name="float32, compiled", is_compiled=True),
    Choice(name="float32, checkpointed", is_checkpointed=True),
    Choice(name="float32, compiled, checkpointed", is_compiled=True, is_checkpointed=True),
    Choice(name="float32, moments of 8 bits", moments="8bit"),
    Choice(name="bfloat16", dtype=torch.bfloat16),
    Choice(name="bfloat16, compiled", dtype=torch.bfloat16, is_compiled=True),
)


@dataclass(slots=True)
class Clock:
    """Seconds of the parts of a step."""

    parts: dict[str, list[float]] = field(default_factory=dict)
    wall_s: list[float] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside."""
        began_s = time.process_time()
        yield
        self.parts.setdefault(name, []).append(time.process_time() - began_s)

    def medians(self) -> dict[str, float]:
        """Of each part."""
        return {name: statistics.median(seconds) for name, seconds in self.parts.items()}


class Learner:
    """A student of one choice, with its optimizer."""

    def __init__(self, choice: Choice, model: Path, mesh: Mesh) -> None:
        torch.manual_seed(0)
        lm = load_causal_lm(model, torch.float32, torch.device("cpu"), weights="random")
        self._student = Student(lm, vocabulary_size=_MODEL["vocab_size"])
        if choice.is_compiled:
            compile_layers(lm)
        if choice.is_checkpointed:
            checkpoint_activations(lm, every=1)
        shard(self._student, mesh.device_mesh, compute_dtype=choice.dtype)
        self._optimizer = build_adamw(self._student, OptimizerConfig(moments=choice.moments))
        self._dtype = choice.dtype
        self.choice = choice
        self.clock = Clock()

    def step(self, sequences: list[TokenSequence], rows_RE: Tensor, teacher: OutputHead) -> None:
        """One micro-batch and one update."""
        clock, dtype = self.clock, self._dtype
        head = OutputHead(weight_VD=teacher.weight_VD.to(dtype))

        def row_loss(hidden_RD: Tensor, student_head: OutputHead, labels_R: Tensor) -> FusedLoss:
            with clock.part("head and loss"):
                return fused_linear_divergence(
                    hidden_RD, student_head, rows_RE.to(dtype), head, divergence=forward_kl, labels_R=labels_R
                )

        began_s = time.perf_counter()
        self._student.train()
        begin_micro_batch(self._student, is_last=True)
        packed = self._student.pack(sequences)
        with clock.part("body and head"):
            loss_sum = self._student(packed, row_loss).loss_sum
        with clock.part("backward"):
            (loss_sum / packed.num_rows).backward()
        with clock.part("norm and update"):
            clip_grad_norm_(self._student.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        clock.wall_s.append(time.perf_counter() - began_s)


def sequences_of(tokens: int, random: np.random.Generator) -> list[TokenSequence]:
    """Of random lengths, with a loss at each position."""
    lengths = []
    while (left := tokens - sum(lengths)) > 1:
        lengths.append(min(left, int(random.integers(tokens // 16, tokens // 4))))
    return [
        TokenSequence(
            token_ids=random.integers(0, _MODEL["vocab_size"], length).astype(np.int32),
            positions=np.arange(length - 1, dtype=np.int32),
        )
        for length in lengths
        if length > 1
    ]


def measure(mesh: Mesh, model: Path, *, tokens: int, rounds: int, wanted: str) -> list[Learner]:
    """Every choice whose name has `wanted` in it and that can be had here, in turn, so many rounds."""
    learners = []
    for choice in _CHOICES:
        if choice.dtype not in (torch.float32, measured_dtype()):
            say(f"{choice.name}: left out, this processor has no fast {choice.dtype}")
        elif choice.moments == "8bit" and find_spec("torchao") is None:
            say(f"{choice.name}: left out, the extra eightbit is not installed")
        elif wanted in choice.name:
            learners.append(Learner(choice, model, mesh))
    random = np.random.default_rng(0)
    teacher = OutputHead(weight_VD=torch.randn(_MODEL["vocab_size"], _TEACHER_SIZE))
    for turn in range(rounds + _WARM_UP):
        sequences = sequences_of(int(random.integers(tokens // 2, tokens)) if turn < _WARM_UP else tokens, random)
        rows_RE = torch.randn(sum(sequence.num_rows for sequence in sequences), _TEACHER_SIZE)
        for learner in learners:
            learner.step(sequences, rows_RE, teacher)
        if turn == _WARM_UP - 1:
            for learner in learners:
                learner.clock = Clock()
    return learners


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="choices whose name has this in it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, joined("cpu", longest_wait_s=60) as mesh:
        config = AutoConfig.for_model("qwen3", **_MODEL)
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(directory)
        learners = measure(
            mesh, Path(directory), tokens=arguments.tokens, rounds=arguments.rounds, wanted=arguments.only
        )
    say(f"One micro-batch of {arguments.tokens} tokens and one update, medians of {arguments.rounds}:")
    figures: dict[str, dict[str, float]] = {}
    for learner in learners:
        medians = learner.clock.medians()
        medians["body"] = medians.pop("body and head") - medians["head and loss"]
        medians["all"] = sum(medians.values())
        figures[learner.choice.name] = medians | {"wall": statistics.median(learner.clock.wall_s)}
    parts = ("body", "head and loss", "backward", "norm and update")
    table(
        ["student", *(f"{part} (s)" for part in parts), "all (s)", "by the clock (s)"],
        [
            [
                name,
                *(f"{one[part]:.2f} ({one[part] / one['all']:.0%})" for part in parts),
                f"{one['all']:.2f}",
                f"{one['wall']:.2f}",
            ]
            for name, one in figures.items()
        ],
    )
    finish("student_step", {name: {part: round(s, 4) for part, s in one.items()} for name, one in figures.items()})


if __name__ == "__main__":
    main()
