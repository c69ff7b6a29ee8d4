"""On-policy training: what is sampled is what is trained on, however the services keep time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdmesh.errors import EngineFailure, ModelMismatch
from kdmesh.losses import FusedLoss
from kdmesh.tokens import digest
from kdmesh.types import Sample, TokenSequence
from kdmesh_trainer.evaluate import HeldOutEvaluator
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.sections.optimizer_config import OptimizerConfig
from kdmesh_trainer.sources.rollouts import Rollout
from kdmesh_trainer.stats import SampleScores
from kdmesh_trainer.stop import StepLost
from kdmesh_trainer.tally import Tally
from tests.support.tiny_models import TinyModels
from tests.support.trainer_devices import shared_losses
from tests.support.trainer_on_policy import (
    MAX_TOKENS,
    PROMPTS_PER_STEP,
    SAMPLES_PER_PROMPT,
    SAMPLING,
    VOCABULARY_SIZE,
    Run,
    losses,
    order,
    prompts,
    serial_losses,
)
from tests.support.trainer_parts import Rows
from tests.support.trainer_ranks import run_ranks
from tests.support.trainer_rollouts import FastRollouts, LocalStudent, Ready, SlowRollouts

SUPPORT = "tests.support.trainer_on_policy"
STEPS = 5


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels) -> dict[str, Any]:
    return {
        **tiny_models.student_and_teacher(),
        "steps": STEPS,
    }


@pytest.fixture(scope="module")
def serial(mesh: Mesh, models: dict[str, Any]) -> dict[str, Any]:
    return serial_losses(mesh, **models)


@pytest.mark.parametrize("kind", ["fast", "slow", "threaded"])
def test_synchronous_training_equals_the_serial_order_bit_for_bit(
    mesh: Mesh, models: dict[str, Any], serial: dict[str, Any], kind: str
) -> None:
    run = losses(mesh, **models, kind=kind)
    assert run["losses"] == serial["losses"]
    assert run["sequences"] == serial["sequences"]
    assert len(set(map(tuple, serial["sequences"]))) == STEPS


def test_two_ranks_train_on_the_samples_of_one(models: dict[str, Any], serial: dict[str, Any]) -> None:
    first, second = run_ranks(f"{SUPPORT}:losses", ranks=2, **models, kind="threaded")
    assert first["losses"] == second["losses"]
    assert first["num_tokens"] == second["num_tokens"]
    assert all(first["sequences"])
    assert all(second["sequences"])
    # Gradients are summed in another order, so later weights, and with them samples, may differ in the last bit.
    assert sorted(first["sequences"][0] + second["sequences"][0]) == serial["sequences"][0]
    assert first["losses"] == pytest.approx(serial["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "context"), [(2, 2), (4, 2)])
def test_ranks_that_hold_rows_together_train_on_the_samples_of_one(
    mesh: Mesh, models: dict[str, Any], ranks: int, context: int
) -> None:
    told = {**models, "answers": 2, "ce_weight": 0.3}
    alone = losses(mesh, **told)
    found = run_ranks(f"{SUPPORT}:losses", ranks=ranks, context=context, **told, kind="threaded")
    groups = [found[first : first + context] for first in range(0, ranks, context)]
    assert all(one["sequences"] == group[0]["sequences"] for group in groups for one in group)
    assert sorted(s for group in groups for s in group[0]["sequences"][0]) == alone["sequences"][0]
    for one in found:
        assert one["losses"] == found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert one["entropies"] == pytest.approx(alone["entropies"], rel=1e-4)
        assert one["cross_entropies"] == pytest.approx(alone["cross_entropies"], rel=1e-4)
        assert max(one["drift"]) < 1e-9


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_slow_trainer_never_sees_samples_older_than_allowed(
    mesh: Mesh, models: dict[str, Any], max_staleness: int
) -> None:
    run = Run(mesh, **models)
    source = run.source(FastRollouts(run.copy), max_staleness=max_staleness)
    for step, (batch, _) in enumerate(run.train(source)):
        assert batch.rollouts is not None
        assert batch.rollouts.staleness_steps_mean == batch.rollouts.staleness_steps_max == min(step, max_staleness)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_slow_service_is_sampled_with_the_newest_weights(
    mesh: Mesh, models: dict[str, Any], max_staleness: int
) -> None:
    run = Run(mesh, **models)
    for batch, _ in run.train(run.source(SlowRollouts(run.copy), max_staleness=max_staleness)):
        assert batch.rollouts is not None
        assert batch.rollouts.staleness_steps_max == 0


def test_staleness_changes_what_is_learnt_and_is_measured(
    mesh: Mesh, models: dict[str, Any], serial: dict[str, Any]
) -> None:
    stale = losses(mesh, **models, max_staleness=2)
    assert stale["losses"][0] == serial["losses"][0]
    assert stale["losses"][1:] != serial["losses"][1:]
    fresh = losses(mesh, **models)
    assert max(fresh["drift"]) < 1e-9
    assert stale["drift"][0] < 1e-9
    assert min(stale["drift"][1:]) > 1e-5


def test_on_a_shared_device_everybody_works_in_turn_and_learns_the_same(
    mesh: Mesh, models: dict[str, Any], serial: dict[str, Any]
) -> None:
    run = shared_losses(mesh, **models)
    assert run["losses"] == serial["losses"]
    turns = [kind for kind, _ in itertools.groupby(run["history"])]
    assert turns == ["teachers", "rollouts", *["teachers", "rollouts", "teachers", "rollouts"] * STEPS]
    assert run["asleep"] == [[], []]


def test_ranks_that_share_devices_wait_for_each_other(models: dict[str, Any], serial: dict[str, Any]) -> None:
    first, second = run_ranks("tests.support.trainer_devices:shared_losses", ranks=2, **models)
    assert first["losses"] == second["losses"] == pytest.approx(serial["losses"], rel=1e-4)


def seen(cross_entropy: list[float]) -> FusedLoss:
    nothing_0 = torch.zeros(0)
    return FusedLoss(
        loss_sum=torch.zeros(()),
        divergence_R=torch.zeros(3),
        cross_entropy_R=torch.tensor(cross_entropy),
        top1_agreement_R=nothing_0,
        student_entropy_R=torch.tensor([1.0, 2.0, 3.0]),
        teacher_entropy_R=torch.tensor([0.5, 0.5, 2.0]),
        topk_overlap_R=nothing_0,
    )


def test_sampler_and_student_are_compared_by_both_estimators(mesh: Mesh) -> None:
    tally = Tally(mesh)
    tally.look_at_samples(seen([1.0, 2.0, 0.25]), torch.tensor([-1.5, -1.75, -0.25]))
    tally.look_at_samples(seen([9.0, 9.0, 9.0]), None)  # not sampled
    totals, _ = tally.over_all_ranks()
    d = np.array([-0.5, 0.25, 0.0])  # log p of the sampler less that of the student
    assert totals.samples == SampleScores(
        sampler_kl_k1_nats=pytest.approx(d.mean()),
        sampler_kl_k3_nats=pytest.approx((np.exp(-d) - 1 + d).mean()),
        student_entropy_nats=2.0,
        teacher_entropy_nats=1.0,
    )


def test_rows_without_a_teachers_have_no_entropies_in_the_mean(mesh: Mesh) -> None:
    tally = Tally(mesh)
    # Rows 0 to 2 were sampled, and the teacher answers row 1 of them; the others are the data's.
    tally.look_at_samples(seen([1.0] * 5), torch.zeros(3), answered_A=np.array([1, 3, 4]))
    totals, _ = tally.over_all_ranks()
    assert totals.samples is not None
    assert (totals.samples.student_entropy_nats, totals.samples.teacher_entropy_nats) == (1.0, 0.5)


def test_without_probabilities_of_tokens_only_entropies_are_told(mesh: Mesh) -> None:
    tally = Tally(mesh)
    tally.look_at_samples(seen([]), torch.tensor([-1.5, -1.75, -0.25]))
    totals, _ = tally.over_all_ranks()
    assert totals.samples == SampleScores(
        sampler_kl_k1_nats=None, sampler_kl_k3_nats=None, student_entropy_nats=2.0, teacher_entropy_nats=1.0
    )
    assert Tally(mesh).over_all_ranks()[0].samples is None


def test_a_continued_run_samples_the_same(mesh: Mesh, models: dict[str, Any]) -> None:
    whole, rest = Run(mesh, **models), Run(mesh, **models, served=9)
    all_of_it, last_of_it = FastRollouts(whole.copy), FastRollouts(rest.copy)
    list(whole.train(whole.source(all_of_it, max_staleness=0)))
    list(rest.train(rest.source(last_of_it, max_staleness=0), first=3))
    assert last_of_it.seeds == all_of_it.seeds[3 * PROMPTS_PER_STEP :]
    assert rest.copy.published == [(10, 3), (11, 4), (12, 5)]  # above what an earlier attempt has served


def test_the_teacher_works_on_a_later_step_whose_samples_are_here(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    asked: list[bytes] = []
    submit = run.teacher.submit

    def counted(sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        asked.append(digest(sequences))
        return submit(sequences)

    run.teacher.submit = counted  # type: ignore[method-assign]
    source = run.source(FastRollouts(run.copy), max_staleness=2, prefetch=100, early_rows=0)
    source.start_at(0)
    source.publish(version=0)
    batches = [source.next_batch()]
    assert len(asked) > len(batches[0].micro_batches)  # those of steps 1 and 2 too, while step 0 is trained on
    batches += [source.next_batch() for _ in range(2)]
    assert asked == [digest(m.sequences) for batch in batches for m in batch.micro_batches]


def test_the_teacher_works_on_a_sample_as_soon_as_it_is_here(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    asked: list[tuple[TokenSequence, ...]] = []
    submit = run.teacher.submit

    def counted(sequences: Sequence[TokenSequence], *, keep: bool = False) -> Rows:
        asked.append(tuple(sequences))
        return submit(sequences)

    run.teacher.submit = counted  # type: ignore[method-assign]
    source = run.source(FastRollouts(run.copy), max_staleness=0, prefetch=100)
    source.start_at(0)
    source.publish(version=0)
    early = [digest(group) for group in asked]  # nothing was planned yet
    batch = source.next_batch()
    assert len(early) == PROMPTS_PER_STEP * SAMPLES_PER_PROMPT
    assert sorted(early) == sorted(digest([s]) for m in batch.micro_batches for s in m.sequences)
    assert len(asked) == len(early)


def test_nothing_beyond_the_last_step_is_sampled(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    service = FastRollouts(run.copy)
    list(run.train(run.source(service, max_staleness=3)))
    assert service.seeds == [prompt.seed for step in range(STEPS) for prompt in order().of_step(step)]


def test_every_drawn_token_carries_loss_and_nothing_is_appended(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    batch, _ = next(run.train(run.source(FastRollouts(run.copy), max_staleness=0)))
    assert batch.rollouts is not None
    drawn = {}
    for prompt in order().of_step(0):
        for i in range(SAMPLES_PER_PROMPT):
            other = Run(mesh, **models).copy.sample(prompt.token_ids, SAMPLING, seed=prompt.seed + i)
            drawn[tuple(prompt.token_ids.tolist()), tuple(other.token_ids.tolist())] = other
    for micro_batch in batch.micro_batches:
        for sequence in micro_batch.sequences:
            start = sequence.num_tokens - sequence.num_rows
            key = tuple(sequence.token_ids[:start].tolist()), tuple(sequence.token_ids[start:].tolist())
            assert sequence.labels.tolist() == list(key[1])
            del drawn[key]
    assert not drawn
    assert 0 < batch.rollouts.cut_off_fraction < 1
    lengths = [s.num_rows for m in batch.micro_batches for s in m.sequences]
    assert batch.rollouts.response_tokens_max == max(lengths) == SAMPLING.max_new_tokens
    assert batch.rollouts.response_tokens_mean == sum(lengths) / len(lengths)


def test_a_server_that_lost_the_weights_gets_them_again(mesh: Mesh, models: dict[str, Any]) -> None:
    whole, run = Run(mesh, **models), Run(mesh, **models)
    expected = [
        stats.loss_nats_per_token for _, stats in whole.train(whole.source(SlowRollouts(whole.copy), max_staleness=0))
    ]
    seen = []
    source = run.source(SlowRollouts(run.copy), max_staleness=0)
    for step, (_, stats) in enumerate(run.train(source)):
        seen.append(stats.loss_nats_per_token)
        if step == 1:
            run.copy.version = 0  # what a server has that was killed and started anew
    assert seen == expected
    assert run.copy.published == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]  # the same under its old number


def blurred(model: Path, path: Path) -> Path:
    """A copy of a model with noise on its head: what must be learnt back is known, and the same for every prompt."""
    lm = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        noise = torch.randn(lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        lm.lm_head.weight.add_(0.2 * noise)
    lm.save_pretrained(path)
    return path


def test_the_student_comes_nearer_to_its_teacher_on_prompts_it_was_not_trained_on(
    mesh: Mesh, models: dict[str, Any], tmp_path: Path
) -> None:
    student = blurred(Path(models["teacher"]), tmp_path / "student")
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    run = Run(mesh, student=str(student), teacher=models["teacher"], steps=20, optimizer=optimizer)
    speaker = LocalStudent(Path(models["teacher"]), vocabulary_size=VOCABULARY_SIZE)
    held_out = [
        Rollout.of(prompt, speaker.sample(prompt, SAMPLING, seed=number)).sequence
        for number, prompt in enumerate(prompts(24)[12:])
    ]
    judge = HeldOutEvaluator(
        run.model,
        held_out,
        teacher=run.teacher,
        teacher_head=TeacherHead(run.teacher, vocabulary_size=VOCABULARY_SIZE, device=mesh.device),
        max_tokens=MAX_TOKENS,
        prefetch=0,
        mesh=mesh,
    )
    before = judge.evaluate().kl_nats_per_token
    list(run.train(run.source(FastRollouts(run.copy), max_staleness=1)))
    after = judge.evaluate().kl_nats_per_token
    assert before is not None
    assert after is not None

    assert after < before / 2


class Forgetful(FastRollouts):
    """Refuses every request: it never has the weights."""

    def submit(self, *arguments: Any, **keywords: Any) -> Ready:
        def refuse() -> list[Sample]:
            raise ModelMismatch("weight version 0 is served, 1 is wanted")

        return Ready(refuse, is_eager=False)


def test_a_server_that_never_has_the_weights_ends_the_run(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    with pytest.raises(ModelMismatch, match="got the weights again: weight version 0 is served, 1 is wanted"):
        next(run.train(run.source(Forgetful(run.copy), max_staleness=0)))


class Liar(FastRollouts):
    """Sends something else than it was asked for."""

    def __init__(self, *arguments: Any, lie: str) -> None:
        super().__init__(*arguments)
        self._lie = lie

    def submit(self, *arguments: Any, **keywords: Any) -> Ready:
        honest = super().submit(*arguments, **keywords).wait()
        return Ready(lambda: self._told(honest), is_eager=True)

    def _told(self, samples: list[Sample]) -> list[Sample]:
        first = samples[0]
        facts: dict[str, Any] = {
            "token_ids": first.token_ids,
            "logprobs": first.logprobs,
            "finish_reason": first.finish_reason,
            "min_weight_version": first.min_weight_version,
            "max_weight_version": first.max_weight_version,
        }
        match self._lie:
            case "too few":
                return samples[1:]
            case "too old":
                return [Sample(**facts | {"min_weight_version": 0}), *samples[1:]]
            case "too long":
                length = SAMPLING.max_new_tokens + 1
                long = {"token_ids": np.ones(length, np.int32), "logprobs": np.zeros(length, np.float32)}
                return [Sample(**facts | long), *samples[1:]]
        raise AssertionError(self._lie)


@pytest.mark.parametrize(
    ("lie", "error", "says"),
    [
        ("too few", StepLost, "sent 1 samples of up to .* asked for 2"),
        ("too long", StepLost, "of up to 13 tokens; it was asked for 2 of at most 12"),
        ("too old", ModelMismatch, "step 0 began on weight version 0; source.max_staleness 0 allows 1"),
    ],
)
def test_what_was_not_asked_for_is_an_error(
    mesh: Mesh, models: dict[str, Any], lie: str, error: type[Exception], says: str
) -> None:
    run = Run(mesh, **models)
    with pytest.raises(error, match=says):
        next(run.train(run.source(Liar(run.copy, lie=lie), max_staleness=0)))


def test_ranks_with_other_prompts_notice(mesh: Mesh, models: dict[str, Any]) -> None:
    run = Run(mesh, **models)
    source = run.source(FastRollouts(run.copy), max_staleness=0)
    sampler = source._sampler
    source.start_at(0)
    source.publish(version=0)
    share = sampler.collect(0)
    with pytest.raises(EngineFailure, match="every rank must have the same prompts"):
        sampler.assemble(1, [share])
