"""On-policy runs of which a judge says how much each sample counts, with services in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdmesh.tokens import digest
from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.judge import Judge
from kdmesh_trainer.sources.rollouts import Rollout, Verdict
from kdmesh_trainer.student.weights import whole
from tests.support.trainer_on_policy import SAMPLES_PER_PROMPT, SAMPLING, VOCABULARY_SIZE, Run, order, service_of
from tests.support.trainer_parts import LocalTeacher, Rows


def weight_of(ids: Sequence[int]) -> float:
    """0, 0.5, 1.5 or 2.5, by a response's tokens."""
    return (0.0, 0.5, 1.5, 2.5)[sum(ids) % 4]


def by_tokens(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
    """What `weight_of` says."""
    return Verdict(weight=weight_of([int(number) for number in text.split()]))


def none(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
    """Nothing counts."""
    return Verdict(weight=0, is_right=False)


def failing(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
    """An error where `weight_of` would leave out."""
    if weight_of([int(number) for number in text.split()]) == 0:
        raise ValueError("no")
    return Verdict(weight=1)


def broken(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
    """Always an error."""
    raise ValueError("no row has that")


OPINIONS = {"by_tokens": by_tokens, "none": none, "failing": failing, "broken": broken}


def _numbers(ids: Int32Array) -> str:
    return " ".join(map(str, ids.tolist()))


def judge(name: str) -> Judge:
    """The one of that name here, which reads tokens as numbers."""
    return Judge(OPINIONS[name], _numbers)


def _list_requests(teacher: LocalTeacher, asked: list[str]) -> None:
    """Have `asked` hold what it was asked for."""
    submit = teacher.submit

    def listed(sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        asked.extend(digest([sequence]).hex() for sequence in sequences)
        return submit(sequences, keep=keep)

    teacher.submit = listed  # type: ignore[method-assign]


def judged(
    mesh: Mesh,
    *,
    names: Sequence[str],
    student: str,
    teacher: str,
    kind: str = "threaded",
    max_staleness: int = 0,
    answers: int = 0,
) -> list[dict[str, Any]]:
    """Each step of a run, of which the first opinion of `names` judges the first step, and so on."""
    run = Run(mesh, student=student, teacher=teacher, steps=len(names), answers=answers)
    asked: list[str] = []
    _list_requests(run.teacher, asked)
    steps: list[dict[str, Any]] = []

    def opinion(text: str, is_cut_off: bool, question: Question | None) -> Verdict:
        return OPINIONS[names[current]](text, is_cut_off, question)

    current = 0
    with service_of(kind, run.copy) as service:
        source = run.source(service, max_staleness=max_staleness, judge=Judge(opinion, _numbers))
        source.start_at(0)
        source.publish(version=0)
        for step in range(len(names)):
            batch = source.next_batch()
            stats = run.stepper.update(batch)
            current = min(step + 1, len(names) - 1)  # what is asked for now is of the next step
            source.publish(version=step + 1)
            of_step = [asked.pop() for _ in range(len(asked))]  # another thread goes on asking
            trained = [s for micro_batch in batch.micro_batches for s in micro_batch.sequences]
            steps.append(
                {
                    "figures": stats.figures(),
                    "trained": sorted(digest([s]).hex() for s in trained),
                    "weights": [s.weight for s in trained],
                    "asked": sorted(of_step),
                    "weight": whole(dict(run.model.lm.named_parameters())["model.norm.weight"], None).tolist(),
                }
            )
    return steps


def gradient(mesh: Mesh, *, student: str, teacher: str, kind: str = "threaded") -> dict[str, Any]:
    """Of the first step's loss, by one of the parameters, with the loss."""
    run = Run(mesh, student=student, teacher=teacher, steps=1)
    with service_of(kind, run.copy) as service:
        source = run.source(service, max_staleness=0, judge=judge("by_tokens"))
        source.start_at(0)
        source.publish(version=0)
        batch = source.next_batch()
        tally = run.stepper.accumulate(batch)
        found = whole(dict(run.model.lm.named_parameters())["model.layers.0.mlp.up_proj.weight"].grad, None)
        loss = tally.over_all_ranks()[0].loss / batch.num_loss_tokens
    return {"loss": loss, "gradient": found.flatten().tolist()}


def textbook(mesh: Mesh, *, student: str, teacher: str) -> tuple[float, Tensor, list[Rollout]]:
    """Loss and gradient of `gradient` in float64, and all samples: sum of weight * KL(teacher || student) over drawn
    tokens, divided by the sum of their weights.
    """
    run = Run(mesh, student=student, teacher=teacher, steps=1)
    run.copy.publish(version=0)
    rollouts = [
        Rollout.of(prompt.token_ids, run.copy.sample(prompt.token_ids, SAMPLING, seed=prompt.seed + i))
        for prompt in order().of_step(0)
        for i in range(SAMPLES_PER_PROMPT)
    ]
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for rollout in rollouts:
        sequence = rollout.sequence
        weight = weight_of(sequence.labels.tolist())
        ids, positions = torch.from_numpy(sequence.token_ids).long()[None], torch.from_numpy(sequence.positions).long()
        log_q_RV = model(ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1)
        log_p_RV = other(ids).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1).detach()
        total = total + weight * (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum()
        weights += weight * len(positions)
    loss = total / weights
    loss.backward()
    gradient = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].grad
    assert gradient is not None
    return float(loss.detach()), gradient, rollouts
