"""Episodes of a student that says what it is told to, under the chat templates of several families."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdmesh.chats.chat_rows import Chat, Message
from kdmesh.errors import KdmeshError
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling
from kdmesh_trainer.data.encoding.chat import ChatEncoder
from kdmesh_trainer.data.encoding.continuation import Continuation
from kdmesh_trainer.data.encoding.sides import Prompt, Question
from kdmesh_trainer.sections.environment_config import EnvironmentConfig
from kdmesh_trainer.sources.environment import Environment, Respond
from kdmesh_trainer.sources.episodes import Episodes
from kdmesh_trainer.sources.order import StepPrompt
from kdmesh_trainer.sources.rollouts import Episode
from tests.support.chat_tokenizers import chat_tokenizer

MAX_NEW_TOKENS = 40


class Turn:
    """A turn that is drawn, or on its way for ever."""

    def __init__(self, sample: Sample | KdmeshError | None) -> None:
        self._found: Future[list[Sample]] = Future()
        self.future = self._found
        if isinstance(sample, KdmeshError):
            self._found.set_exception(sample)
        elif sample is not None:
            self._found.set_result([sample])

    async def arrive(self) -> list[Sample]:
        return await asyncio.wrap_future(self._found)


class Speaker:
    """A TurnService that draws the tokens which `says` answers to the ids that it is prompted with and the seed."""

    def __init__(self, says: Callable[[list[int], int], Sample | KdmeshError | None]) -> None:
        self._says = says
        self.asked: list[tuple[list[int], int, int]] = []  # ids, seed, oldest weights
        self.turns: list[Turn] = []

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...] = (),
    ) -> Turn:
        assert num_samples == 1
        self.asked.append((prompt_ids.tolist(), seed, min_weight_version))
        turn = Turn(self._says(prompt_ids.tolist(), seed))
        self.turns.append(turn)
        return turn


class World:
    """A tokenizer with its template, and a row."""

    def __init__(self, family: str, *, form: str = "byte_level", template: str = "") -> None:
        """`template` replaces that of the family; empty: none does."""
        self.tokenizer: PreTrainedTokenizerFast = chat_tokenizer(family, form=form)
        if template:
            self.tokenizer.chat_template = template
        self.encoder = ChatEncoder(self.tokenizer)
        end = self.encoder.end_of_turn()
        self.ends = () if end is None else (end,)
        self.sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=self.ends)

    def prompt(self, question: str = "what is it?", *, seed: int = 100) -> StepPrompt:
        """A row's prompt."""
        chat = Chat(messages=(Message(role="user", content=question),), origin="train.jsonl:3")
        [prompt] = self.encoder.encode_prompts([chat])
        assert isinstance(prompt, Prompt)
        row = {"question": question, "level": 2}
        return StepPrompt(token_ids=prompt.token_ids, question=Question(chat=chat, answers=(), row=row), seed=seed)

    def sample(self, text: str, *, is_cut: bool = False, version: int = 3, end: int | None = None) -> Sample:
        """A turn that says so, and ends unless it was cut."""
        ids = self.encoder.encode_text(text)
        if not is_cut:
            ids = [*ids, *(self.ends if end is None else (end,))]
        return Sample(
            token_ids=np.array(ids, np.int32),
            logprobs=-np.arange(1, len(ids) + 1, dtype=np.float32),
            finish_reason=FinishReason.LENGTH if is_cut else FinishReason.STOP,
            min_weight_version=version,
            max_weight_version=version,
        )

    def speaker(self, texts: Sequence[str]) -> Speaker:
        """One that says these, turn by turn, in any episode."""
        roles = self.generation_prompts

        def says(ids: list[int], seed: int) -> Sample:
            return self.sample(texts[roles(ids) - 1])

        return Speaker(says)

    def generation_prompts(self, ids: list[int]) -> int:
        """How many turns of the assistant a text begins."""
        opening = self.encoder.generation_prompt([Message(role="user", content="x")])
        return str(self.tokenizer.decode(ids)).count(opening)

    def environment(self, respond: Respond, **keys: Any) -> Environment:
        """One of this template."""
        cfg = EnvironmentConfig(respond="my_module:respond", **keys)
        return Environment(cfg, respond, Continuation(self.tokenizer, keeps_drawn=cfg.history == "drawn"))

    def episodes(
        self,
        service: Speaker,
        respond: Respond,
        *,
        prompt: StepPrompt | None = None,
        num: int = 1,
        max_tokens: int = 10**6,
        deadline_s: float = 30,
        **keys: Any,
    ) -> list[Episode]:
        """So many of one prompt, each as it is told when it ends, and together."""
        environment = self.environment(respond, deadline_s=deadline_s, **keys)
        drawn = Episodes(service, environment, max_tokens=max_tokens, deadline_s=deadline_s, max_calls=4)
        told: list[Sample] = []
        try:
            pending = drawn.submit(
                prompt or self.prompt(),
                self.sampling,
                num_samples=num,
                min_weight_version=3,
                on_sample=told.append,
            )
            found = [sample for sample in pending.wait() if isinstance(sample, Episode)]
        finally:
            drawn.close()
        assert {id(sample) for sample in told} == {id(episode) for episode in found}
        return found

    def text(self, ids: Sequence[int]) -> str:
        """With special tokens."""
        return str(self.tokenizer.decode(ids))


def answering(*answers: str, role: str = "user") -> Respond:
    """Answers the first turn with the first of these, and so on; then the episode ends."""

    def respond(messages: list[dict[str, object]], row: dict[str, object]) -> list[dict[str, object]] | None:
        turn = sum(message["role"] == "assistant" for message in messages)
        return [{"role": role, "content": answers[turn - 1]}] if turn <= len(answers) else None

    return respond
