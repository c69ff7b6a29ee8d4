"""On-policy jobs whose student is answered by code of the user's own, with the real services."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kdmesh.rpc.rollouts.pool import RolloutPool
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import FinishReason, Int32Array, Sampling
from kdmesh_trainer.sources.order import step_order
from tests.support.tiny_models import VOCABULARY_SIZE
from tests.support.trainer_jobs import write_chats
from tests.system.conftest import Materials
from tests.system.environments import by_length
from tests.system.processes import Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow

STEPS, PROMPTS, SAMPLES = 5, 2, 2
MAX_TURNS, MAX_NEW_TOKENS, MAX_TOKENS = 4, 16, 224
EVERY = 3
STOPS = ("e", "n")  # a random model ends a turn soon by one of them, and hardly ever by a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Jobs of one recipe, each with a rollout server of its own, and the teacher of them all."""

    whole: Job  # on two ranks
    parts: Job  # on two ranks, ended after two steps and gone on; its rollout server was killed
    alone: Job  # on one rank
    teacher: Teacher  # still serves
    rows: Path


def sections(rollouts: Rollouts, rows: Path, **source: Any) -> dict[str, Any]:
    """Of a job."""
    environment = {"respond": "tests.system.environments:by_length", "params": {"every": EVERY}}
    return {
        "data": {"max_tokens": MAX_TOKENS, "train": {"format": "chat", "path": str(rows)}},
        "batch": {"sequences": PROMPTS * SAMPLES, "max_tokens": MAX_TOKENS},
        "steps": STEPS,
        "checkpoint": {"every": 2},
        "evaluation": {},
        "source": {
            "kind": "on_policy",
            "rollouts": {"addresses": [rollouts.address], "deadline_s": 100},
            "samples_per_prompt": SAMPLES,
            "sampling": {"max_new_tokens": MAX_NEW_TOKENS, "stop_strings": list(STOPS)},
            "environment": {**environment, "max_turns": MAX_TURNS},
            "show_every": 1,
            **source,
        },
    }


def write_rows(path: Path) -> Path:
    """Chats with a level each."""
    chats = [json.loads(line) for line in write_chats(path, 12, seed=1).read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**chat, "level": n}) for n, chat in enumerate(chats)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("environment")
    rows = write_rows(root / "train.jsonl")
    teacher = Teacher(processes, root / "teacher", materials.teacher)
    teacher.start()
    jobs, servers = {}, {}
    for name in ("whole", "parts", "alone"):
        servers[name] = Rollouts(processes, root / f"rollouts-{name}", materials.plain.student)
        servers[name].start()
        jobs[name] = Job(processes, root / name, materials.plain, teacher.address, **sections(servers[name], rows))
    whole = jobs["whole"].start_ranks(2)
    jobs["parts"].start_ranks(2, "steps=2").succeed()
    whole.succeed()
    alone, second = jobs["alone"].start(), jobs["parts"].start_ranks(2)
    second.until(lambda: len(jobs["parts"].steps()) >= 3)
    servers["parts"].process.signal(signal.SIGKILL)
    servers["parts"].start()
    second.succeed()
    alone.succeed()
    return Story(**jobs, teacher=teacher, rows=rows)


def test_a_job_that_was_interrupted_and_lost_its_server_learns_exactly_the_same(story: Story) -> None:
    assert story.parts.record() == story.whole.record()
    assert [step["step"] for step in story.whole.steps()] == list(range(STEPS))


def test_one_rank_draws_and_learns_what_two_do(story: Story) -> None:
    for one, two in zip(story.alone.steps(), story.whole.steps(), strict=True):
        for name in ("num_tokens", "num_loss_tokens", "response_tokens", "episode_turns_mean", "environment_fraction"):
            assert one[name] == two[name], name
        assert one["loss_nats_per_token"] == pytest.approx(two["loss_nats_per_token"], rel=1e-4)


def test_ranks_that_hold_rows_together_draw_and_learn_what_one_does(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    together = {**sections(rollouts, story.rows), "parallel": {"context": 2}}
    job = Job(processes, tmp_path / "together", materials.plain, story.teacher.address, **together)
    job.start_ranks(2).succeed()
    same = ("num_tokens", "num_loss_tokens", "episode_turns_mean", "environment_fraction")
    for one, two in zip(story.alone.steps(), job.steps(), strict=True):
        assert [one[name] for name in same] == [two[name] for name in same]
        for name in ("loss_nats_per_token", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
        assert two["sampler_kl_k3_nats"] < 1e-5


def test_a_rank_that_is_killed_while_an_episode_is_answered_changes_nothing(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts, waits = Rollouts(processes, tmp_path / "rollouts", materials.plain.student), tmp_path / "waits"
    rollouts.start()
    environment = {"respond": "tests.system.environments:that_waits", "params": {"every": EVERY, "flag": str(waits)}}
    job = Job(
        processes,
        tmp_path / "killed",
        materials.plain,
        story.teacher.address,
        **sections(rollouts, story.rows, environment={**environment, "max_turns": MAX_TURNS}),
    )
    first = job.start_ranks(2)
    first.until(lambda: len(job.steps()) >= 3)
    waits.touch()
    first.until(lambda: waits.with_suffix(".asked").exists())
    psutil.Process(first.pid).children()[1].kill()
    assert first.exit_code() != 0
    waits.unlink()
    job.start_ranks(2).succeed()
    assert job.record() == story.whole.record()


def test_figures_and_shown_samples_say_how_episodes_went(story: Story) -> None:
    steps = story.whole.steps()
    ends = ("environment", "turns", "length", "template")
    for step in steps:
        assert sum(step[f"ended_by_{end}_fraction"] for end in ends) == pytest.approx(1)
        assert step["num_loss_tokens"] == step["response_tokens"] < step["num_tokens"]
        assert step["sampler_kl_k3_nats"] < 1e-5  # of the drawn tokens alone, and each under what came before it
    assert max(step["episode_turns_mean"] for step in steps) > 1.5
    assert max(step["environment_fraction"] for step in steps) > 0.3
    assert sum(step["ended_by_environment_fraction"] for step in steps) > 0
    shown = [json.loads(line) for line in (story.whole.output / "samples.jsonl").read_text().splitlines()]
    responses = [response for line in shown for response in line["responses"]]
    assert {response["ended_by"] for response in responses} <= set(ends)
    for response in responses:
        assert response["text"].count("<|im_start|>assistant\n") == response["turns"] - 1
        assert response["text"].count(" at level ") == response["turns"] - 1


def drawn_again(
    pool: RolloutPool, tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], seed: int
) -> tuple[list[int], list[int]]:
    """An episode turn by turn: all ids, and the indices of those that were drawn."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    sampling = Sampling(
        max_new_tokens=MAX_NEW_TOKENS, stop_strings=STOPS, stop_token_ids=tuple(sorted(_ends(tokenizer)))
    )
    messages = row["messages"][:-1]
    ids = encode(_rendered(tokenizer, messages))
    trained: list[int] = []
    for turn in range(MAX_TURNS):
        own_seed = seed if turn == 0 else seed_of("turn", seed, turn)
        [sample] = pool.submit(np.array(ids, np.int32), sampling, num_samples=1, seed=own_seed).wait()
        drawn: Int32Array = sample.token_ids
        trained += range(len(ids), len(ids) + len(drawn))
        ids += drawn.tolist()
        ended = int(drawn[-1]) in _ends(tokenizer)
        text = str(tokenizer.decode(drawn[: len(drawn) - ended], clean_up_tokenization_spaces=False))
        messages = [*messages, {"role": "assistant", "content": text}]
        if sample.finish_reason is FinishReason.LENGTH or (reply := by_length(messages, row, every=EVERY)) is None:
            break
        between = "" if ended else "<|im_end|>"
        between += f"\n<|im_start|>user\n{reply[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        if turn == MAX_TURNS - 1 or len(ids) + len(encode(between)) + MAX_NEW_TOKENS > MAX_TOKENS:
            break
        messages += reply
        ids += encode(between)
    return ids, trained


def _ends(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {int(tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_end|>", "<|endoftext|>")}


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_the_first_step_s_loss_is_that_of_the_drawn_tokens_alone(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    rows = [json.loads(line) for line in story.rows.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(materials.plain.student)
    episodes = []
    with RolloutPool([rollouts.address], job="oracle", deadline_s=60, connect_s=60) as pool:
        for place, index in enumerate(step_order(rows, per_step=PROMPTS, seed=0).of_step(0)):
            seed = seed_of("training", 0, 0, place)
            episodes += [drawn_again(pool, tokenizer, rows[index], seed + number) for number in range(SAMPLES)]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (materials.plain.student, materials.teacher)
    )
    total = 0.0
    with torch.no_grad():
        for ids, trained in episodes:
            positions = torch.tensor(trained) - 1
            log_q_RV, log_p_RV = (
                model(torch.tensor([ids])).logits[0, positions, :VOCABULARY_SIZE].log_softmax(-1)
                for model in (student, teacher)
            )
            total += float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum())
    first = story.alone.steps()[0]
    num_trained = sum(len(trained) for _, trained in episodes)
    assert first["num_loss_tokens"] == num_trained
    assert first["num_tokens"] == sum(len(ids) for ids, _ in episodes) > num_trained
    assert first["loss_nats_per_token"] == pytest.approx(total / num_trained, rel=1e-5)


def test_episodes_that_newer_weights_overtake_are_as_stale_as_their_oldest_turn(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    overlapped = sections(rollouts, story.rows, max_staleness=2, update_policy="continue", sampled_fraction=0.7)
    overlapped["source"]["environment"]["history"] = "drawn"
    overlapped |= {"steps": 8, "batch": {"sequences": 6, "max_tokens": MAX_TOKENS}}
    job = Job(processes, tmp_path / "job", materials.plain, story.teacher.address, **overlapped)
    job.start_ranks(2).succeed()
    assert len(job.steps()) == 8
    assert {step["staleness_steps_max"] for step in job.steps()} <= {0, 1, 2}
    assert max(step["staleness_steps_max"] for step in job.steps()) > 0
    assert {step["ended_by_template_fraction"] for step in job.steps()} == {0}
    assert all(step["num_loss_tokens"] > step["response_tokens"] for step in job.steps())  # and answers of the data


def test_an_environment_that_fails_ends_the_job_and_a_checkpoint_belongs_to_its_environment(
    story: Story, materials: Materials, processes: Processes, tmp_path: Path
) -> None:
    rollouts = Rollouts(processes, tmp_path / "rollouts", materials.plain.student)
    rollouts.start()
    job = Job(
        processes,
        tmp_path / "job",
        materials.plain,
        story.teacher.address,
        **sections(
            rollouts,
            story.rows,
            environment={"respond": "tests.system.environments:failing"},
            judge={"name": "custom", "target": "tests.system.environments:by_turns"},
        ),
    )
    failed = job.start_ranks(2)
    assert failed.exit_code() == 2
    words = " ".join(failed.words())
    assert "train.jsonl:" in words
    assert "source.environment tests.system.environments:failing, turn 1: LookupError: level" in words
    refused = job.start("source.environment.respond=tests.system.environments:none")
    assert refused.exit_code() == 2
    assert "source.environment: tests.system.environments:none: tests.system.environments has no function" in " ".join(
        refused.words()
    )
    good = "source.environment={respond: 'tests.system.environments:by_length', params: {every: 3}}"
    job.start(good, "steps=2").succeed()
    weights = [step["sample_weight_mean"] for step in job.steps()]
    assert len(weights) == 2
    assert all(0 < weight < 1 for weight in weights)
    refused = job.start(good, "steps=3", "source.environment.max_turns=3")
    assert refused.exit_code() == 2
    assert "max_turns" in " ".join(refused.words())
    job.start(good, "steps=3", "source.environment.deadline_s=30", "source.environment.max_calls=1").succeed()
