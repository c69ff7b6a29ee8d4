"""Episodes: what the student drew, what it was answered, why they end, and what can go wrong on their way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kdmesh.errors import EnvironmentFailed, KdmeshError, ModelMismatch
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import Sample
from kdmesh_trainer.sources.episodes import Episodes
from kdmesh_trainer.sources.rollouts import Episode, EpisodeEnd, Rollout
from tests.support.episode_runs import MAX_NEW_TOKENS, Speaker, World, answering

SAID = ("the answer is no", "yes it is", "nobody knows")


@pytest.mark.parametrize("form", ["byte_level", "gpt2", "metaspace"])
@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "plain"])
def test_an_episode_is_the_tokens_of_its_chat_of_which_those_that_were_drawn_are_trained_on(
    family: str, form: str
) -> None:
    world = World(family, form=form)
    prompt = world.prompt()
    said = [f" {text}" for text in SAID] if family == "plain" else SAID  # its template writes a space before a turn
    service = world.speaker(said)
    [episode] = world.episodes(service, answering("why?", "Was it so?"))
    assert episode.turns.end is EpisodeEnd.ENVIRONMENT
    turns = [world.sample(text).token_ids.tolist() for text in said]
    assert [episode.token_ids[first:end].tolist() for first, end in episode.turns.spans] == turns
    rollout = Rollout.of(prompt.token_ids, episode)
    assert rollout.sequence.labels.tolist() == [token for turn in turns for token in turn]
    assert rollout.logprobs.tolist() == [-float(n + 1) for turn in turns for n in range(len(turn))]
    given = np.setdiff1d(np.arange(episode.num_tokens), np.concatenate([np.arange(*s) for s in episode.turns.spans]))
    assert (episode.logprobs[given] == 0).all()
    chat = [{**message.for_template(), "content": message.content.strip()} for message in episode.messages]
    whole = world.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    length = rollout.sequence.num_tokens
    assert world.text(whole).startswith(world.text(rollout.sequence.token_ids.tolist()))
    # Of these the tokens of a prompt, or of a turn, are others once text follows.
    if (family, form) not in {("llama3", "gpt2"), ("plain", "metaspace")}:
        assert whole[:length] == rollout.sequence.token_ids.tolist()
        assert world.text(whole[length:]).strip() == ""
    roles = [message.role for message in episode.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant"]
    # Each turn was prompted by all that was before it.
    ids = rollout.sequence.token_ids.tolist()
    starts = [len(prompt.token_ids) + first for first, _ in episode.turns.spans]
    assert [asked for asked, _, _ in service.asked] == [ids[:start] for start in starts]


def test_an_episode_of_one_turn_is_a_sample_with_the_same_seed() -> None:
    world = World("chatml")
    prompt = world.prompt(seed=700)
    service = world.speaker(SAID)
    alike = world.episodes(service, answering(), prompt=prompt, num=3)
    assert sorted(seed for _, seed, _ in service.asked) == [700, 701, 702]
    plain, episode = (Rollout.of(prompt.token_ids, one) for one in (world.sample(SAID[0]), alike[0]))
    assert episode.sequence.token_ids.tolist() == plain.sequence.token_ids.tolist()
    assert episode.sequence.positions.tolist() == plain.sequence.positions.tolist()
    assert episode.logprobs.tolist() == plain.logprobs.tolist()
    assert (episode.is_cut_off, episode.weight_version) == (plain.is_cut_off, plain.weight_version)


def test_turns_are_drawn_from_seeds_of_their_own_that_follow_from_the_prompt_s() -> None:
    world = World("chatml")
    runs = []
    for _ in range(2):
        service = world.speaker(SAID)
        world.episodes(service, answering("why?", "so?"), num=2)
        assert {oldest for _, _, oldest in service.asked} == {3}
        runs.append(sorted(seed for _, seed, _ in service.asked))
    expected = [100, 101, *(seed_of("turn", seed, turn) for seed in (100, 101) for turn in (1, 2))]
    assert runs == [sorted(expected)] * 2
    assert len(set(expected)) == 6


def test_an_episode_is_as_old_as_its_oldest_turn() -> None:
    world = World("chatml")
    versions = {1: 5, 2: 4, 3: 9}

    def says(ids: list[int], seed: int) -> Sample:
        return world.sample("no", version=versions[world.generation_prompts(ids)])

    [episode] = world.episodes(Speaker(says), answering("why?", "so?"))
    assert (episode.min_weight_version, episode.max_weight_version) == (4, 9)
    assert Rollout.of(world.prompt().token_ids, episode).weight_version == 4


def test_an_episode_ends_at_the_most_turns_that_it_may_have() -> None:
    world = World("chatml")
    [episode] = world.episodes(world.speaker(SAID), answering("why?", "so?", "and?"), max_turns=2)
    assert (episode.turns.end, len(episode.turns.spans)) == (EpisodeEnd.TURNS, 2)
    assert episode.token_ids[-1] == world.ends[0]  # nothing is behind the last turn
    assert Rollout.of(world.prompt().token_ids, episode).is_cut_off
    [episode] = world.episodes(world.speaker(SAID), answering("why?"), max_turns=2)
    assert episode.turns.end is EpisodeEnd.ENVIRONMENT  # it is asked after the last one too


def test_a_turn_that_was_cut_is_the_last_one_and_is_not_answered() -> None:
    world = World("chatml")
    asked: list[int] = []

    def respond(messages: list[dict[str, object]], row: dict[str, object]) -> list[dict[str, object]]:
        asked.append(len(messages))
        return [{"role": "user", "content": "why?"}]

    def says(ids: list[int], seed: int) -> Sample:
        return world.sample("it was so", is_cut=world.generation_prompts(ids) == 2)

    [episode] = world.episodes(Speaker(says), respond)
    assert (episode.turns.end, len(episode.turns.spans), asked) == (EpisodeEnd.LENGTH, 2, [2])
    assert Rollout.of(world.prompt().token_ids, episode).is_cut_off


def test_a_turn_is_drawn_only_where_it_has_room_for_all_the_tokens_that_it_may_have() -> None:
    world = World("chatml")
    prompt = world.prompt()
    [whole] = world.episodes(world.speaker(SAID), answering("why?"))
    second = len(prompt.token_ids) + whole.turns.spans[1][0]
    for room, turns, end in ((0, 2, EpisodeEnd.ENVIRONMENT), (-1, 1, EpisodeEnd.LENGTH)):
        most = second + MAX_NEW_TOKENS + room
        [episode] = world.episodes(world.speaker(SAID), answering("why?"), max_tokens=most)
        assert (len(episode.turns.spans), episode.turns.end) == (turns, end)
        assert episode.messages[-1].role == "assistant"
        assert len(prompt.token_ids) + episode.num_tokens <= most


THOUGHT = "<think>so it is</think>yes"


def test_an_episode_ends_where_the_template_would_change_what_was_drawn() -> None:
    world = World("qwen3")
    [episode] = world.episodes(world.speaker([THOUGHT, "no"]), answering("why?"))
    assert (episode.turns.end, len(episode.turns.spans)) == (EpisodeEnd.TEMPLATE, 1)
    [episode] = world.episodes(world.speaker(["yes", "no"]), answering("why?"))
    assert (episode.turns.end, len(episode.turns.spans)) == (EpisodeEnd.ENVIRONMENT, 2)


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "harmony"])
def test_with_drawn_history_the_student_goes_on_from_what_it_said(family: str) -> None:
    world = World(family)
    texts = [f" {THOUGHT} ", "no"]
    [episode] = world.episodes(world.speaker(texts), answering("why?"), history="drawn")
    assert episode.turns.end is EpisodeEnd.ENVIRONMENT
    first, second = episode.turns.spans
    assert episode.token_ids[slice(*first)].tolist() == world.sample(texts[0]).token_ids.tolist()
    between = world.text(episode.token_ids[first[1] : second[0]].tolist())
    chats = [[{"role": "user", "content": "what?"}, {"role": "assistant", "content": "stands here"}]]
    chats[0].append({"role": "user", "content": "why?"})
    text = str(world.tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True))
    follows = text.partition("stands here")[2]
    end = {"harmony": "<|end|>", "llama3": "<|eot|>"}.get(family, "<|im_end|>")
    assert between == follows.removeprefix(end)


# Reasoning stays until a user speaks again, as Qwen3's does, and is written in one form.
KEEPS_REASONING_FOR_TOOLS = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content.split('</think>') %}<|im_start|>{{ m.role }}\n"
    "{% if said | length > 1 and loop.index0 > last.user %}"
    "<think>\n{{ said[0].removeprefix('<think>').strip() }}\n</think>\n\n{% endif %}"
    "{{ said[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("first", "roles", "end"),
    [
        ("<think>\nso\n</think>\n\nyes", ["tool"], EpisodeEnd.ENVIRONMENT),
        ("<think>\nso\n</think>\n\nyes", ["tool", "user"], EpisodeEnd.TEMPLATE),
        ("<think>so</think>yes", ["tool"], EpisodeEnd.TEMPLATE),
        ("yes", ["tool", "user"], EpisodeEnd.ENVIRONMENT),
    ],
)
def test_an_episode_goes_on_as_long_as_the_template_keeps_its_reasoning(
    first: str, roles: list[str], end: EpisodeEnd
) -> None:
    world = World("chatml", template=KEEPS_REASONING_FOR_TOOLS)

    def respond(messages: list[dict[str, object]], row: dict[str, object]) -> list[dict[str, object]] | None:
        turn = sum(message["role"] == "assistant" for message in messages)
        return [{"role": roles[turn - 1], "content": "7"}] if turn <= len(roles) else None

    [episode] = world.episodes(world.speaker([first, "no", "so"]), respond)
    assert episode.turns.end is end
    chat = [message.for_template() for message in episode.messages]
    whole = world.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ids = Rollout.of(world.prompt().token_ids, episode).sequence.token_ids.tolist()
    is_canonical = first != "<think>so</think>yes"
    assert (whole[: len(ids)] == ids) == is_canonical


# As GLM's: nothing ends a turn but the one that follows, whose first token a model says.
ROLES_ALONE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("history", "end", "between"),
    [
        ("templated", "<|user|>", "\nwhy?<|assistant|>\n"),
        ("drawn", "<|user|>", "\nwhy?<|assistant|>\n"),
        ("drawn", "<|eos|>", "<|user|>\nwhy?<|assistant|>\n"),
    ],
)
def test_what_begins_the_answer_stands_there_once(history: str, end: str, between: str) -> None:
    world = World("chatml", template=ROLES_ALONE)
    [token] = world.encoder.encode_text(end)
    world.sampling = replace(world.sampling, stop_token_ids=(token,))
    service = Speaker(lambda ids, seed: world.sample("no", end=token))
    [episode] = world.episodes(service, answering("why?"), history=history)
    (_, first), (second, _) = episode.turns.spans
    assert world.text(episode.token_ids[first:second].tolist()) == between


def test_a_turn_that_a_text_ended_is_ended_for_the_template() -> None:
    world = World("chatml")
    first = world.sample("calc(2)", is_cut=True)

    def says(ids: list[int], seed: int) -> Sample:
        if world.generation_prompts(ids) == 2:
            return world.sample("so 2")
        return Sample(
            token_ids=first.token_ids,
            logprobs=first.logprobs,
            finish_reason=world.sample("").finish_reason,
            min_weight_version=3,
            max_weight_version=3,
        )

    [episode] = world.episodes(Speaker(says), answering("2"))
    (_, end), (begin, _) = episode.turns.spans
    assert world.text(episode.token_ids[end:begin].tolist()) == (
        "<|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_environment_sees_the_row_and_the_messages_and_cannot_change_them() -> None:
    world = World("chatml")
    seen: list[Any] = []

    def respond(messages: list[dict[str, object]], row: dict[str, object]) -> list[dict[str, object]] | None:
        seen.append((list(messages), dict(row)))
        messages.clear()
        row.clear()
        return [{"role": "user", "content": "why?"}] if len(seen) == 1 else None

    [episode] = world.episodes(world.speaker(SAID), respond)
    row = {"question": "what is it?", "level": 2}
    asked = {"role": "user", "content": "what is it?"}
    first = [asked, {"role": "assistant", "content": SAID[0]}]
    second = [*first, {"role": "user", "content": "why?"}, {"role": "assistant", "content": SAID[1]}]
    assert seen == [(first, row), (second, row)]
    assert [message.for_template() for message in episode.messages] == second


def test_what_an_environment_does_to_a_row_is_gone_with_its_call() -> None:
    world = World("chatml")
    prompt = world.prompt()
    assert prompt.question is not None
    row: dict[str, Any] = {"board": [], "state": {"moves": 0}}
    prompt = replace(prompt, question=replace(prompt.question, row=row))

    def plays(messages: list[dict[str, object]], row: dict[str, Any]) -> list[dict[str, object]] | None:
        row["board"] += messages
        row["state"]["moves"] += 1
        moves = row["state"]["moves"], len(row["board"])
        return None if len(messages) > 4 else [{"role": "user", "content": f"{moves}"}]

    for _ in range(2):  # drawn again it goes as before
        [episode] = world.episodes(world.speaker(SAID), plays, prompt=prompt)
        assert [each.content for each in episode.messages if each.role == "user"] == ["what is it?", "(1, 2)", "(1, 4)"]
    assert row == {"board": [], "state": {"moves": 0}}


def failing(messages: list[dict[str, object]], row: dict[str, object]) -> None:
    raise KeyError(row["level"])


def leaving(messages: list[dict[str, object]], row: dict[str, object]) -> None:
    sys.exit(0)


def hanging(messages: list[dict[str, object]], row: dict[str, object]) -> None:
    time.sleep(2)


def returning(value: Any) -> Callable[[list[dict[str, object]], dict[str, object]], Any]:
    return lambda messages, row: value


@pytest.mark.parametrize(
    ("family", "respond", "words"),
    [
        ("chatml", failing, "train.jsonl:3: source.environment my_module:respond, turn 1: KeyError: 2"),
        ("chatml", leaving, "train.jsonl:3: source.environment my_module:respond, turn 1: SystemExit: 0"),
        ("chatml", hanging, "turn 1: no answer within source.environment.deadline_s, 0.2 s"),
        ("chatml", returning("why?"), "turn 1 returned 'why.'; it must be a list of at least one message, or None"),
        ("chatml", returning([]), r"returned \[\]; it must be a list of at least one message"),
        ("chatml", returning(["why?"]), "turn 1"),
        ("chatml", returning([{"role": "robot", "content": "a"}]), "unknown role 'robot'"),
        ("chatml", returning([{"role": "user", "content": 3}]), "must be a string, not int"),
        ("chatml", returning([{"role": "assistant", "content": "a"}]), "a turn of the assistant, which is the student"),
        (
            "gemma",
            returning([{"role": "system", "content": "a"}]),
            "turn 1: the chat template refuses messages of user",
        ),
    ],
)
def test_an_environment_that_fails_ends_the_run_and_is_named_with_its_row(
    family: str, respond: Callable[..., Any], words: str
) -> None:
    world = World(family)
    with pytest.raises(EnvironmentFailed, match=words) as failed:
        world.episodes(world.speaker(SAID), respond, num=2, deadline_s=0.2 if respond is hanging else 30)
    assert str(failed.value).startswith("train.jsonl:3: source.environment my_module:respond, turn 1")


def test_servers_that_refuse_a_turn_refuse_the_prompt() -> None:
    world = World("chatml")

    def says(ids: list[int], seed: int) -> Sample | KdmeshError:
        return ModelMismatch("2 is served") if world.generation_prompts(ids) == 2 else world.sample("no")

    with pytest.raises(ModelMismatch, match="2 is served"):
        world.episodes(Speaker(says), answering("why?"), num=2)


def until(is_so: Callable[[], bool]) -> None:
    """Return when it is so."""
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_nobody_waits_for_is_aborted() -> None:
    world = World("chatml")
    service = Speaker(lambda ids, seed: None)
    drawn = Episodes(service, world.environment(answering()), max_tokens=10**6, deadline_s=30, max_calls=1)
    try:
        pending = drawn.submit(
            world.prompt(), world.sampling, num_samples=2, min_weight_version=0, on_sample=lambda sample: None
        )
        until(lambda: len(service.turns) == 2)
        del pending
        until(lambda: all(turn.future.cancelled() for turn in service.turns))
    finally:
        drawn.close()


def test_episodes_of_one_prompt_are_answered_at_the_same_time() -> None:
    world = World("chatml")
    began = time.monotonic()
    waiting = 0.5

    def slow(messages: list[dict[str, object]], row: dict[str, object]) -> None:
        time.sleep(waiting)

    found = world.episodes(world.speaker(SAID), slow, num=4)
    assert len(found) == 4
    assert all(isinstance(episode, Episode) for episode in found)
    assert time.monotonic() - began < 3 * waiting
