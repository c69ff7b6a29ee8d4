"""Answers of a model behind an OpenAI API: its turns are sent, and turns come back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdmesh.answering.answer_report import Counts
from kdmesh.answering.prompt_rows import Asked
from kdmesh.answering.source import Answers, Plan, image_column
from kdmesh.chats.chat_rows import chat_from_messages
from kdmesh.chats.image_files import ImageColumn
from kdmesh.errors import DataError, InvalidRequest
from kdmesh.openai.bodies import Choice, Reply, request_messages, request_tools
from kdmesh.openai.client import EndpointClient, PromptFiltered
from kdmesh.openai.servers import NUM_SEEDS, ChatServers
from kdmesh.rpc.background_loop import BackgroundLoop
from kdmesh.sampling.seeds import seed_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointServers:
    """Servers with OpenAI's chat completions, for a dataset of their answers."""

    chat_servers: ChatServers
    skips_rejected: bool  # whether a prompt that is refused is left out, instead of ending everything

    @contextmanager
    def opened(self, plan: Plan, image_root: Path) -> Iterator[EndpointAnswers]:
        """See Servers. Nothing is asked yet."""
        with self.chat_servers.connected() as (client, loop):
            yield EndpointAnswers(self, client, loop, plan, image_root)


class EndpointAnswers:
    """See AnswerSource. Answers come in the order in which they are whole."""

    def __init__(
        self, servers: EndpointServers, client: EndpointClient, loop: BackgroundLoop, plan: Plan, image_root: Path
    ) -> None:
        self.images: ImageColumn = image_column(image_root)
        self._model = servers.chat_servers.endpoint.model
        self._concurrency = servers.chat_servers.concurrency
        self._skips_rejected = servers.skips_rejected
        self._client = client
        self._loop = loop
        self._plan = plan
        self._fields = servers.chat_servers.request_fields(plan.sampling, plan.template_settings)
        self._takes_n = True

    @property
    def facts(self) -> Mapping[str, Any]:
        """See AnswerSource. A server may be elsewhere the next time, with the same model."""
        return {"servers": {"kind": "openai", "model": self._model}, "request": self._fields}

    def check(self, asked: Asked) -> None:
        """See AnswerSource."""
        try:
            json.dumps([*asked.tools, *asked.calls], allow_nan=False)
        except ValueError:
            raise DataError(f"{asked.origin}: its tools hold a number that no JSON has") from None

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answers]]:
        """See AnswerSource."""
        return self._loop.each(self._answered, asked, at_once=self._concurrency)

    async def _answered(self, asked: Asked) -> Answers:
        body, seed = self._body(asked), seed_of("generate", self._plan.seed, asked.number)
        choices: list[Choice] = []
        counts = Counts()
        try:
            while (missing := self._plan.samples - len(choices)) > 0:
                reply = await self._ask({"seed": (seed + len(choices)) % NUM_SEEDS, **body}, missing)
                choices += reply.choices[:missing]  # one that does not know n gives fewer
                counts += Counts(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        except PromptFiltered:
            counts += Counts(filtered=self._plan.samples - len(choices))
        except InvalidRequest as error:
            if not self._skips_rejected:
                raise InvalidRequest(
                    f"{asked.origin}: {error}. The prompts that a server refuses are left out with --skip-rejected"
                ) from None
            counts += Counts(rejected=1)
        return self._sorted(choices, counts)

    async def _ask(self, body: Mapping[str, Any], number: int) -> Reply:
        """For so many answers, or as many as come at once."""
        body = {name: value for name, value in body.items() if value is not None}
        if number == 1 or not self._takes_n:
            return await self._client.ask(body)
        try:
            return await self._client.ask(body | {"n": number})
        except PromptFiltered:
            raise
        except InvalidRequest as error:
            try:
                reply = await self._client.ask(body)
            except InvalidRequest:  # so it is not for n
                raise error from None
            self._takes_n = False
            return reply

    def _body(self, asked: Asked) -> dict[str, Any]:
        """Of every request for its answers; None leaves a field out."""
        return {
            "model": self._model,
            "messages": request_messages(asked.turns),
            "tools": request_tools(asked.tools) or None,
            **self._fields,
        }

    def _sorted(self, choices: list[Choice], counts: Counts) -> Answers:
        turns = []
        for choice in choices:
            counts += Counts(cut_off=choice.end == "cut_off")
            match choice.end:
                case "filtered":
                    counts += Counts(filtered=1)
                case "refused":
                    counts += Counts(refused=1)
                case "cut_off" if not self._plan.keeps_cut_off:
                    pass
                case _ if not choice.text.strip() and not choice.tool_calls:
                    counts += Counts(blank=1)
                case _ if not _is_usable(choice.turn):
                    counts += Counts(malformed=1)
                case _:
                    turns.append(choice.turn)
        return Answers(turns=turns, counts=counts)


def _is_usable(turn: Mapping[str, Any]) -> bool:
    """Whether a dataset may hold it."""
    try:
        chat_from_messages([turn], origin="answer")
    except DataError:
        return False
    return True
