"""Time of the fused loss against one teacher, and against mixtures of two and three."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.loss_inputs import STUDENT_SIZE, TEACHER_SIZE, Inputs, inputs
from benchmarks.measure import finish, say, table
from kdmesh.losses import MixedTeacher, OutputHead, forward_kl, fused_linear_divergence

_TEACHERS = (1, 2, 3)


def main() -> None:
    """Print one table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    given = parser.parse_args()
    rows = 128 if given.quick else 2048
    vocabularies = (2000,) if given.quick else (32_000, 151_936)
    say(
        f"{rows} rows, student D={STUDENT_SIZE}, teachers D={TEACHER_SIZE}, bfloat16, {torch.get_num_threads()} threads"
    )
    figures: dict[str, object] = {"rows": rows}
    cells = []
    for vocabulary in vocabularies:
        medians = _medians_s(inputs(rows, vocabulary), rounds=2 if given.quick else given.rounds)
        figures[f"seconds_{vocabulary}"] = {number: round(seconds, 3) for number, seconds in medians.items()}
        cells.append([vocabulary, *(f"{s:.2f} s ({s / medians[1]:.2f}x)" for s in medians.values())])
    table(["V", "1 teacher", "2 mixed", "3 mixed"], cells)
    finish("loss_mixture", figures)


def _medians_s(x: Inputs, *, rounds: int) -> dict[int, float]:
    """Of a forward and backward pass, by the number of teachers; the first round is not counted."""
    seconds: dict[int, list[float]] = {number: [] for number in _TEACHERS}
    for _ in range(rounds + 1):
        for number, own in seconds.items():
            own.append(_pass_s(x, number))
    return {number: statistics.median(own[1:]) for number, own in seconds.items()}


def _pass_s(x: Inputs, number: int) -> float:
    teacher = OutputHead(weight_VD=x.teacher_VE)
    further = [MixedTeacher(hidden_RE=x.teacher_RE, head=teacher, weight=1 / number)] * (number - 1)
    student = OutputHead(weight_VD=x.student_VD)
    began_s = time.perf_counter()
    loss = fused_linear_divergence(
        x.student_RD, student, x.teacher_RE, teacher, divergence=forward_kl, mixed_with=further
    )
    torch.autograd.grad(loss.loss_sum, x.leaves)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
