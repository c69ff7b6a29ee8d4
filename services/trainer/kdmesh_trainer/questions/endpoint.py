"""Asks a model behind an OpenAI API the questions of a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product

from kdmesh.chats.image_files import ImageColumn
from kdmesh.counting import Pace, Show
from kdmesh.errors import InvalidRequest
from kdmesh.openai.bodies import request_messages, request_tools
from kdmesh.openai.client import EndpointClient, PromptFiltered
from kdmesh.openai.servers import NUM_SEEDS, ChatServers
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import Sampling
from kdmesh_trainer.data.images import dataset_images
from kdmesh_trainer.questions.grading import KeepAnswers, TakeAnswered, graded, read_graded, tell_of_errors
from kdmesh_trainer.questions.scores import Answered, AnswerScores, Response, scores_of
from kdmesh_trainer.sections.data_config import DataConfig
from kdmesh_trainer.sections.questions_config import QuestionsConfig

_Ask = tuple[int, int]  # number of a question, and of its sample


class EndpointExaminer:
    """The questions of a run, for a model that is asked by text: no tokenizer is needed, and none is compared.

    Raises, when made:
        ConfigError: a grader cannot be found or called.
        DataError: a question cannot be used; none is ever left out.
    """

    def __init__(self, cfg: QuestionsConfig, data: DataConfig, servers: ChatServers) -> None:
        """
        Args:
            data: of the run, for what is set in its chat template, and where images are.
        """
        images = ImageColumn(source=dataset_images(data.images, cfg.path.parent), name=data.images.column)
        self._questions, self._is_right = read_graded(cfg, images)
        self._cfg = cfg
        self._servers = servers
        self._fields = servers.request_fields(Sampling(**cfg.sampling.model_dump()), data.chat_template_settings)

    def examine(self, show: Show, *, keep: KeepAnswers, take: TakeAnswered) -> AnswerScores:
        """How the model answers: each sample of a question is asked for by itself. Blocks.

        Args:
            show: is told how many answers are there.
            keep: called at the end.
            take: called with each question as soon as it has all its answers.

        Raises:
            ConfigError: there is no such model, or no such server at that URL.
            RpcError: the servers refuse a question, or do not answer.
            CheckpointError: what was answered cannot be written.
        """
        asks = list(product(range(len(self._questions)), range(self._cfg.samples)))
        found: dict[_Ask, Response] = {}
        pace = Pace(done=0, total=len(asks))
        show(0, len(asks), None)
        with self._servers.connected() as (client, loop):
            work = partial(self._response, client)
            for ask, response in loop.each(work, asks, at_once=self._servers.concurrency):
                found[ask] = response
                if (each := self._answered(ask[0], found)) is not None:
                    take(self._questions[each.number], each)
                show(len(found), len(asks), pace.left_s(len(found)))
        every = (self._answered(number, found) for number in range(len(self._questions)))
        answered = [each for each in every if each is not None]
        keep(0, self._questions, answered)
        tell_of_errors(self._questions, answered)
        return scores_of(answered, ks=sorted(self._cfg.pass_at))

    def _answered(self, number: int, found: Mapping[_Ask, Response]) -> Answered | None:
        """The answers to a question; None: some have not come."""
        asks = [(number, sample) for sample in range(self._cfg.samples)]
        if any(ask not in found for ask in asks):
            return None
        return Answered(number=number, responses=tuple(found[ask] for ask in asks))

    async def _response(self, client: EndpointClient, ask: _Ask) -> Response:
        number, sample = ask
        question = self._questions[number]
        body = {
            "model": self._servers.endpoint.model,
            "messages": request_messages(question.chat.messages),
            "tools": request_tools(question.chat.tools) or None,
            "seed": (seed_of("question", self._cfg.seed, number) + sample) % NUM_SEEDS,
            **self._fields,
        }
        try:
            reply = await client.ask({name: value for name, value in body.items() if value is not None})
        except PromptFiltered:
            return _filtered("", num_tokens=0)
        except InvalidRequest as error:
            raise InvalidRequest(f"{question.chat.origin}: {error}") from None
        choice = reply.choices[0]
        cut_off, tokens = choice.end == "cut_off", reply.completion_tokens
        if choice.end == "filtered":
            return _filtered(choice.text, num_tokens=tokens)
        return graded(self._is_right, question, choice.text, is_cut_off=cut_off, num_tokens=tokens)


def _filtered(text: str, *, num_tokens: int) -> Response:
    """Wrong whatever was said until the filter stopped it: no grader is asked."""
    return Response(text=text, is_right=False, is_cut_off=False, num_tokens=num_tokens)
