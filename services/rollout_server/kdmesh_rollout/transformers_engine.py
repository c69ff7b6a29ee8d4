"""Samples from a Hugging Face causal LM in this process, on the CPU or one GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdmesh.errors import Unavailable
from kdmesh.losses.head import OutputHead
from kdmesh.losses.workspace import Workspace
from kdmesh.models.decoding.decoder import Decoder, prepare_decoding
from kdmesh.models.fingerprint import architecture_fingerprint
from kdmesh.models.head import head_spec, output_head
from kdmesh.models.images.reader import ImageReader
from kdmesh.models.placement import DTYPES
from kdmesh.models.positions import safe_limit
from kdmesh.models.replaceable import ReplaceableWeights
from kdmesh.models.resting_weights import RestingWeights, give_back_memory
from kdmesh.models.served import load_served
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.sampling.drawing import draw
from kdmesh.sampling.growing import GrowingSample
from kdmesh.sampling.logits import sampling_logits
from kdmesh.sampling.stops import StopStrings
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import SleepTag
from kdmesh.weights.target import StagesInWeights
from kdmesh_rollout.config import TransformersEngine as TransformersEngineConfig
from kdmesh_rollout.engine import EngineDescription, Finished, Order


class _Group:
    """Samples that are decoded together; sample i is row i of the decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.samples: list[GrowingSample] = []

    def remove(self, row: int) -> None:
        self.decoder.leave(row)
        self.samples[row] = self.samples[-1]
        self.samples.pop()


class TransformersEngine(StagesInWeights):
    """Decodes what is under way in one batch: new samples join between steps, finished ones leave.

    When deterministic, every sample is decoded alone: its kernels then see the same shapes, and it
    gets the same tokens, whatever else is served.
    """

    def __init__(self, config: TransformersEngineConfig) -> None:
        self._config = config
        self._model: PreTrainedModel
        self._head: OutputHead | None = None  # of real tokens; views of the parameters. None: they sleep
        self._tokenizer: PreTrainedTokenizerBase | None
        self._reader: ImageReader | None
        self._workspace = Workspace()
        self._waiting: list[GrowingSample] = []
        self._groups: list[_Group] = []
        self._version = 0
        self._weights: ReplaceableWeights
        self._resting: RestingWeights | None = None
        self._drawn_tokens = self._prefilled_tokens = 0

    # Loading

    def load(self) -> EngineDescription:
        """Read the model and its tokenizer; sets this process's number of torch threads when one is configured."""
        config = self._config
        self._model, self._reader = load_served(
            config.model, dtype=config.dtype, on=config.device, threads=config.threads
        )
        prepare_decoding(self._model)
        self._tokenizer = load_tokenizer(config.model)
        self._weights = ReplaceableWeights(self._model)
        return self._describe()

    def _describe(self) -> EngineDescription:
        config, model = self._config, self._model
        vocabulary_size, fingerprint = output_head(model).vocabulary_size, ""
        if self._tokenizer is not None:
            vocabulary = self._tokenizer.get_vocab()
            vocabulary_size, fingerprint = max(vocabulary.values()) + 1, tokenizer_fingerprint(vocabulary)
        self._vocabulary_size = head_spec(model, vocabulary_size).vocabulary_size
        self._take_head()
        limit = safe_limit(model.config) or config.max_sequence_tokens
        self._max_sequence_tokens = min(limit, config.max_sequence_tokens)
        return EngineDescription(
            name=config.model.resolve().name,
            architecture_fingerprint=architecture_fingerprint(model),
            tokenizer_fingerprint=fingerprint,
            vocabulary_size=vocabulary_size,
            dtype=DTYPES[model.dtype],
            max_sequence_tokens=self._max_sequence_tokens,
            max_running=config.max_running,
            is_deterministic=config.deterministic,
            vision=self._reader,
        )

    def _take_head(self) -> None:
        """Views of the parameters: they hold the new values after a commit."""
        self._head = output_head(self._model).detached().sliced(self._vocabulary_size)

    # Sampling

    def add(self, order: Order) -> None:
        """Begin a sample with the next step."""
        stops = StopStrings(order.sampling.stop_strings, self._decode)
        self._waiting.append(
            GrowingSample(
                order.key,
                order.prompt_ids,
                sampling=order.sampling,
                seed=order.seed,
                max_sequence_tokens=self._max_sequence_tokens,
                stops=stops,
                images=order.images,
            )
        )

    def abort(self, key: int) -> None:
        """Forget a sample."""
        self._waiting = [sample for sample in self._waiting if sample.key != key]
        with torch.inference_mode():  # as the tensors were made
            for group in self._groups:
                for row in reversed(range(len(group.samples))):
                    if group.samples[row].key == key:
                        group.remove(row)

    def step(self) -> list[Finished]:
        """Draw one token for every sample under way; prompts join afterwards, and get their first."""
        with torch.inference_mode():
            self._groups = [group for group in self._groups if group.samples]
            finished = []
            for group in self._groups:
                hidden_BD = group.decoder.advance([sample.newest for sample in group.samples])
                finished += self._draw(group, 0, hidden_BD)
            for samples in self._joining():
                finished += self._join(samples)
        return finished

    def interrupt(self) -> None:
        """Nothing: a step does not wait."""

    @property
    def num_running(self) -> int:
        """Samples under way."""
        return len(self._waiting) + sum(len(group.samples) for group in self._groups)

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens drawn since the start."""
        return self._drawn_tokens

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed since the start."""
        return self._prefilled_tokens

    def _joining(self) -> Iterator[list[GrowingSample]]:
        """Takes samples that join now, each list as one batch; a list's samples share prompts where they can."""
        prompts: set[bytes] = set()
        tokens = taken = 0
        for sample in self._waiting:
            name, length = sample.name, len(sample.sequence_ids)
            cost = 0 if name in prompts and not self._config.deterministic else length
            if taken and tokens + cost > self._config.max_prefill_tokens:
                break
            prompts.add(name)
            tokens, taken = tokens + cost, taken + 1
        joining, self._waiting = self._waiting[:taken], self._waiting[taken:]
        if self._config.deterministic:
            yield from ([sample] for sample in joining)
        elif joining:
            yield joining

    def _join(self, samples: Sequence[GrowingSample]) -> list[Finished]:
        """Compute each different prompt once, and draw every sample's first token."""
        group = self._group_for(samples)
        first = len(group.samples)
        alike: dict[bytes, list[GrowingSample]] = {}
        for sample in samples:
            alike.setdefault(sample.name, []).append(sample)
        leaders = [same[0] for same in alike.values()]
        hidden_PD = group.decoder.join(
            [leader.sequence_ids for leader in leaders], [leader.images for leader in leaders]
        )
        self._prefilled_tokens += sum(len(leader.sequence_ids) for leader in leaders)
        group.samples += leaders
        sources = list(range(len(leaders)))
        for source, same in enumerate(alike.values()):
            for sample in same[1:]:
                group.decoder.fork(first + source)
                group.samples.append(sample)
                sources.append(source)
        return self._draw(group, first, hidden_PD[sources])

    def _group_for(self, samples: Sequence[GrowingSample]) -> _Group:
        if self._config.deterministic or not self._groups:
            # A deterministic sample's memory depends on nothing but itself, and never moves.
            longest = max(sample.longest for sample in samples) if self._config.deterministic else 1
            self._groups.append(_Group(Decoder(self._model, tokens=longest, reader=self._reader)))
        return self._groups[-1]

    def _draw(self, group: _Group, first: int, hidden_BD: Tensor) -> list[Finished]:
        """Draw for the rows from `first` on; those that have finished leave."""
        drawing = group.samples[first:]
        assert self._head is not None
        logits_BV = sampling_logits(self._head, hidden_BD, self._workspace)
        # An image token without an image is nothing that a sequence may hold.
        never = None if self._reader is None else self._reader.token_id
        tokens, logprobs = draw(logits_BV, [sample.draw(hidden_BD.device) for sample in drawing], never=never)
        self._drawn_tokens += len(drawing)
        outcomes = [
            sample.take(token, logprob, version=self._version)
            for sample, token, logprob in zip(drawing, tokens, logprobs, strict=True)
        ]
        for row in reversed(range(len(outcomes))):  # the last row takes the place of one that leaves
            if outcomes[row] is not None:
                group.remove(first + row)
        return [
            Finished(key=sample.key, sample=outcome)
            for sample, outcome in zip(drawing, outcomes, strict=True)
            if outcome is not None
        ]

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    # Weights

    def commit(self, version: int) -> None:
        """Copy the new values over the old ones; what is under way is computed anew from its tokens."""
        self._weights.commit(version)
        self._version = version
        self._waiting = [sample for group in self._groups for sample in group.samples] + self._waiting
        self._groups = []

    # Sleep

    @property
    def sleep_refusal(self) -> str:
        """It can sleep."""
        return ""

    def sleep(self, tags: Set[SleepTag]) -> None:
        """Put the weights away; drop keys, values, states and scratch."""
        if SleepTag.KV_CACHE in tags:
            self._groups = []
            self._workspace = Workspace()
        if SleepTag.WEIGHTS in tags:
            self._head = None
            try:
                self._resting = RestingWeights(self._model)
            except Unavailable:
                self._take_head()
                raise
        give_back_memory(self._model.device)

    def wake(self, tags: Set[SleepTag]) -> None:
        """Bring the weights back; the cache grows anew."""
        if SleepTag.WEIGHTS in tags:
            assert self._resting is not None
            self._resting.restore()
            self._resting = None
            self._take_head()
