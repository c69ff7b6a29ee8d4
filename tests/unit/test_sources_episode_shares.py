"""Episodes are shared by ranks, judged, counted and shown as what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from kdmesh.errors import EngineFailure, EnvironmentFailed
from kdmesh.tokens import digest
from kdmesh.types import Sample
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.sections.judge_config import JudgeConfig
from kdmesh_trainer.sources.environment import Respond
from kdmesh_trainer.sources.episodes import Episodes
from kdmesh_trainer.sources.judge import Judge, resolve_judge
from kdmesh_trainer.sources.order import PromptOrder
from kdmesh_trainer.sources.rollouts import Episode, Rollout, Verdict, figures_of, refuse_unanswerable
from kdmesh_trainer.sources.sampler import Sampler
from kdmesh_trainer.sources.shares import samples_of, share_of
from kdmesh_trainer.sources.show import Showcase
from tests.support.episode_runs import Speaker, World, answering
from tests.unit.test_sources_sampler import Answers

WORLD = World("chatml")
PROMPTS = [WORLD.prompt(question) for question in ("why?", "what is it?", "was it so?", "how are you?", "and?")]


def says(ids: list[int], seed: int) -> Sample:
    """A turn that follows from what it answers and from its seed."""
    random = np.random.default_rng([seed, *ids])
    words = random.choice(["yes", "no", "it was", "nobody knows"], int(random.integers(1, 5)))
    return WORLD.sample(" ".join(words), is_cut=bool(random.random() < 0.1))


def by_words(messages: list[dict[str, object]], row: dict[str, object]) -> list[dict[str, object]] | None:
    words = len(str(messages[-1]["content"]).split())
    return None if words == 4 else [{"role": "user", "content": f"{words} words, {row['question']}"}]


def sampler(episodes: Episodes, *, rank: int = 0, ranks: int = 1, judge: Judge | None = None) -> Sampler:
    """Of three prompts a step, with two episodes each."""
    prompts = [Prompt(token_ids=prompt.token_ids, question=prompt.question) for prompt in PROMPTS]
    return Sampler(
        PromptOrder(prompts, per_step=3, seed=1),
        Answers(),
        sampling=WORLD.sampling,
        samples_per_prompt=2,
        rank=rank,
        ranks=ranks,
        judge=judge,
        episodes=episodes,
    )


@contextmanager
def drawing(service: Speaker, respond: Respond) -> Iterator[Episodes]:
    """Episodes of at most four turns and 400 tokens."""
    environment = WORLD.environment(respond, max_turns=4)
    episodes = Episodes(service, environment, max_tokens=400, deadline_s=30, max_calls=4)
    try:
        yield episodes
    finally:
        episodes.close()


def assembled(ranks: int, *, judge: Judge | None = None) -> list[list[Rollout]]:
    """A step's rollouts, as each rank has them."""
    with drawing(Speaker(says), by_words) as episodes:
        members = [sampler(episodes, rank=rank, ranks=ranks, judge=judge) for rank in range(ranks)]
        for member in members:
            member.ask(0, min_weight_version=3)
        shares = [member.collect(0) for member in members]
    return [member.assemble(0, shares) for member in members]


def facts(rollouts: list[Rollout]) -> list[Any]:
    return [
        (digest([r.sequence]), r.logprobs.tolist(), r.turns, r.is_cut_off, r.weight_version, r.verdict)
        for r in rollouts
    ]


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_assemble_the_episodes_that_one_alone_would_draw(ranks: int) -> None:
    [alone] = assembled(1)
    assert len({rollout.turns and len(rollout.turns.spans) for rollout in alone}) > 1
    assert all(facts(rollouts) == facts(alone) for rollouts in assembled(ranks))


def test_a_share_says_which_tokens_were_drawn() -> None:
    [episode] = WORLD.episodes(WORLD.speaker(["yes", "no"]), answering("why?"))
    share = share_of([episode], [], digest=b"", wait_s=0, drawing_s=0)
    [told] = samples_of(share)
    assert isinstance(told, Episode)
    assert (told.turns, told.finish_reason) == (episode.turns, episode.finish_reason)
    assert told.token_ids.tolist() == episode.token_ids.tolist()
    [plain] = samples_of(share_of([WORLD.sample("yes")], [], digest=b"", wait_s=0, drawing_s=0))
    assert not isinstance(plain, Episode)


def test_each_turn_is_held_to_the_limit_of_turns() -> None:
    long = WORLD.sample("so " * 60)
    with drawing(Speaker(lambda ids, seed: long), answering()) as episodes:
        member = sampler(episodes)
        member.ask(0, min_weight_version=3)
        with pytest.raises(EngineFailure, match=f"2 samples of up to {long.num_tokens} tokens; .* of at most 40"):
            member.collect(0)


def by_turns(response: str, row: dict[str, object], is_cut_off: bool, messages: list[dict[str, object]]) -> float:
    assert messages[-1] == {"role": "assistant", "content": response}
    assert messages[0] == {"role": "user", "content": row["question"]}
    return 10 * is_cut_off + sum(message["role"] == "assistant" for message in messages)


def test_a_judge_of_the_user_s_sees_all_messages_of_an_episode() -> None:
    cfg = TypeAdapter(JudgeConfig).validate_python({"name": "custom", "target": f"{__name__}:by_turns"})
    judge = Judge(resolve_judge(cfg, of_episodes=True), lambda ids: WORLD.text(ids.tolist()).removesuffix("<|im_end|>"))
    [rollouts] = assembled(1, judge=judge)
    for rollout in rollouts:
        assert rollout.turns is not None
        assert rollout.verdict == Verdict(weight=10 * rollout.is_cut_off + len(rollout.turns.spans))


def test_a_judge_that_matches_looks_at_the_last_turn() -> None:
    cfg = TypeAdapter(JudgeConfig).validate_python({"name": "finished", "cut": 0.25})
    seen: list[str] = []

    def decode(ids: Any) -> str:
        seen.append(WORLD.text(ids.tolist()))
        return seen[-1]

    [episode] = WORLD.episodes(WORLD.speaker(["yes", "no"]), answering("why?", "so?"), max_turns=2)
    found = Judge(resolve_judge(cfg), decode).submit(PROMPTS[0], episode, lambda verdict: None).result()
    assert (found.weight, seen) == (0.25, ["no<|im_end|>"])  # which the environment did not end


def test_figures_count_turns_and_what_was_given() -> None:
    texts, answers = ["yes", "no", "it was"], ("why?", "so?")
    long = WORLD.episodes(WORLD.speaker(texts), answering(*answers))
    short = WORLD.episodes(WORLD.speaker(texts), answering(*answers), max_turns=1)
    rollouts = [Rollout.of(PROMPTS[0].token_ids, episode) for episode in (*long, *short)]
    figures = figures_of(rollouts, [0, 0], waits_s=[0.0], drawing_s=0.0)
    drawn = sum(WORLD.sample(text).num_tokens for text in [*texts, "yes"])
    total = long[0].num_tokens + short[0].num_tokens
    assert figures.response_tokens == drawn
    assert figures.environment_fraction == (total - drawn) / total > 0
    assert figures.episode_turns_mean == 2
    assert (figures.ended_by_environment_fraction, figures.ended_by_turns_fraction) == (0.5, 0.5)
    assert (figures.ended_by_length_fraction, figures.ended_by_template_fraction) == (0, 0)
    plain = figures_of([Rollout.of(PROMPTS[0].token_ids, WORLD.sample("yes"))], [0], waits_s=[0.0], drawing_s=0.0)
    assert plain.episode_turns_mean is None


def test_a_run_whose_template_allows_no_second_turn_ends_with_what_to_do() -> None:
    world = World("qwen3")
    thinking, plain = (
        Rollout.of(PROMPTS[0].token_ids, world.episodes(world.speaker([text, "no"]), answering("why?"))[0])
        for text in ("<think>so</think>yes", "yes")
    )
    refuse_unanswerable(5, [thinking, plain])
    refuse_unanswerable(5, [Rollout.of(PROMPTS[0].token_ids, WORLD.sample("yes"))])
    with pytest.raises(EnvironmentFailed, match=r"all 2 episodes of step 5 .* `source.environment.history: drawn`"):
        refuse_unanswerable(5, [thinking, thinking])


def test_an_episode_is_shown_whole(tmp_path: Path) -> None:
    [episode] = WORLD.episodes(WORLD.speaker(["yes", "no"]), answering("why?"))
    show = Showcase(
        tmp_path / "samples.jsonl",
        lambda ids: WORLD.text(ids.tolist()),
        decode_teacher=lambda ids: "",
        every=1,
        samples_per_prompt=1,
    )
    show.show(0, [Rollout.of(PROMPTS[1].token_ids, episode)])
    [line] = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert line["prompt"] == "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    [shown] = line["responses"]
    assert shown == {
        "text": "yes<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>",
        "is_cut_off": False,
        "turns": 2,
        "ended_by": "environment",
    }
