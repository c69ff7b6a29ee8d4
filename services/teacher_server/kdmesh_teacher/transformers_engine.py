"""Runs a Hugging Face causal LM in this process, on the CPU or one GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdmesh.models.attention import varlen_refusal
from kdmesh.models.body import hidden_states_TD
from kdmesh.models.fingerprint import architecture_fingerprint, model_fingerprint
from kdmesh.models.head import head_spec, output_head
from kdmesh.models.images.packing import Packer
from kdmesh.models.images.reader import ImageReader
from kdmesh.models.layer_outputs import captured, numbered_layers
from kdmesh.models.placement import DTYPES
from kdmesh.models.positions import safe_limit, stated_limit
from kdmesh.models.replaceable import ReplaceableWeights
from kdmesh.models.resting_weights import RestingWeights, give_back_memory
from kdmesh.models.served import load_served
from kdmesh.models.tokenizer import load_tokenizer
from kdmesh.tokens import tokenizer_fingerprint
from kdmesh.types import HeadSpec, SleepTag, TokenSequence
from kdmesh.weights.target import StagesInWeights
from kdmesh_teacher.config import TransformersEngine as TransformersEngineConfig
from kdmesh_teacher.engine import EngineDescription, HeadParts, PrefillJob

# On a CPU the activations of more tokens leave its caches: 8000 tokens in one row took 1.2 times as long as in rows
# of 2000 (40M parameters, 2 cores).
_CPU_ROW_TOKENS = 2048


class _Target(NamedTuple):
    """One sequence, and where its rows go."""

    sequence: TokenSequence
    out_RC: Tensor  # the rows of a job's `out` that are its own: C columns, D of each of the following
    layers: tuple[int, ...]  # whose outputs are behind the final hidden state


class TransformersEngine(StagesInWeights):
    """Lays sequences end to end, without padding, and stops before the lm_head.

    When deterministic, every sequence is computed alone: its kernels then see the same
    shapes, and its rows are the same bits, whatever else is served.
    """

    def __init__(self, config: TransformersEngineConfig) -> None:
        self._config = config
        self._model: PreTrainedModel
        self._resting: RestingWeights | None = None
        self._reader: ImageReader | None
        self._packer: Packer
        self._layers: Mapping[int, nn.Module] = {}  # by number; empty where their outputs cannot be told
        self._is_varlen: bool  # whether a row's sequences are attended to in one call
        self._weights: ReplaceableWeights  # where the configuration lets them be replaced

    def load(self) -> EngineDescription:
        """Read the model and its tokenizer; sets this process's number of torch threads when one is configured."""
        config = self._config
        self._model, self._reader = load_served(
            config.model, dtype=config.dtype, on=config.device, threads=config.threads
        )
        self._packer = Packer(self._model, self._reader)
        self._layers = numbered_layers(self._model)
        model = self._model
        self._is_varlen = varlen_refusal(model.config, model.dtype, model.device) is None
        if config.updatable:
            self._weights = ReplaceableWeights(self._model)
        return self._describe()

    def prefill(self, jobs: Sequence[PrefillJob]) -> None:
        """Write every job's rows; on the CPU, that is the one copy they ever go through."""
        with torch.inference_mode():
            for row in self._rows([target for job in jobs for target in self._targets(job)]):
                self._compute(row)

    def head_parts(self) -> HeadParts:
        """The output head's own memory where that lies in the CPU's, else a copy."""
        head = output_head(self._model)
        return HeadParts(
            weight=_bytes_of(head.weight_VD),
            bias=None if head.bias_V is None else _bytes_of(head.bias_V),
            dtype=DTYPES[head.weight_VD.dtype],
        )

    # Sleep

    @property
    def sleep_refusal(self) -> str:
        """It can sleep."""
        return ""

    def sleep(self, tags: Set[SleepTag]) -> None:
        """Put the weights away; there is no cache between batches."""
        if SleepTag.WEIGHTS in tags:
            self._resting = RestingWeights(self._model)
        give_back_memory(self._model.device)

    def wake(self, tags: Set[SleepTag]) -> None:
        """Bring the weights back."""
        if SleepTag.WEIGHTS in tags:
            assert self._resting is not None
            self._resting.restore()
            self._resting = None

    # Weights

    def commit(self, version: int) -> None:
        """Compute with the new weights from the next prefill on."""
        self._weights.commit(version)

    # Loading

    def _describe(self) -> EngineDescription:
        config, model = self._config, self._model
        head, fingerprint = self._vocabulary()
        architecture = architecture_fingerprint(model) if config.updatable else ""
        # A model without learnt positions may state no limit.
        stated = stated_limit(model.config) if config.deterministic else safe_limit(model.config)
        limit = stated or config.max_batch_tokens
        return EngineDescription(
            name=config.model.resolve().name,
            model_fingerprint=architecture or model_fingerprint(model, *self._read_as()),
            tokenizer_fingerprint=fingerprint,
            hidden_size=output_head(model).hidden_size,
            dtype=DTYPES[model.dtype],
            head=head,
            max_sequence_tokens=min(limit, config.max_batch_tokens),
            max_batch_tokens=config.max_batch_tokens,
            is_deterministic=config.deterministic,
            architecture_fingerprint=architecture,
            vision=self._reader,
            num_layers=len(self._layers),
        )

    def _read_as(self) -> tuple[str, ...]:
        return () if self._reader is None else (self._reader.fingerprint,)

    def _vocabulary(self) -> tuple[HeadSpec, str]:
        """The head for the tokenizer's tokens, and the tokenizer's fingerprint; without one, every row is a token."""
        tokenizer = load_tokenizer(self._config.model)
        if tokenizer is None:
            return head_spec(self._model, output_head(self._model).vocabulary_size), ""
        vocabulary = tokenizer.get_vocab()
        return head_spec(self._model, max(vocabulary.values()) + 1), tokenizer_fingerprint(vocabulary)

    # Computing

    def _targets(self, job: PrefillJob) -> Iterator[_Target]:
        out_RC = torch.frombuffer(job.out, dtype=self._model.dtype).view(job.num_rows, -1)
        shares = torch.split(out_RC, [sequence.num_rows for sequence in job.sequences])
        return (_Target(*each, job.layers) for each in zip(job.sequences, shares, strict=True))

    def _rows(self, targets: list[_Target]) -> Iterator[list[_Target]]:
        """The targets in order, cut into packed rows."""
        if self._config.deterministic:
            yield from ([target] for target in targets)
            return
        most = _CPU_ROW_TOKENS if self._model.device.type == "cpu" else self._config.max_batch_tokens
        row: list[_Target] = []
        tokens = 0
        for target in targets:
            if row and tokens + target.sequence.num_tokens > most:
                yield row
                row, tokens = [], 0
            row.append(target)
            tokens += target.sequence.num_tokens
        if row:
            yield row

    def _compute(self, row: list[_Target]) -> None:
        packed = self._packer.pack([target.sequence for target in row])
        if self._is_varlen:
            packed = packed.with_starts()
        packed = packed.to(self._model.device)
        layers = sorted({layer for target in row for layer in target.layers})
        with captured({layer: self._layers[layer] for layer in layers}) as outputs:
            hidden_TD = hidden_states_TD(self._model, packed)
        if hidden_TD.is_cuda:
            _copy_rows(hidden_TD, outputs, packed.rows_R, row)
            torch.cuda.current_stream(hidden_TD.device).synchronize()
        else:
            _select_rows(hidden_TD, outputs, packed.rows_R, row)


def _select_rows(hidden_TD: Tensor, outputs: Mapping[int, Tensor], rows_R: Tensor, row: list[_Target]) -> None:
    """Write every target's rows, which are on the CPU as these are."""
    counts = [target.sequence.num_rows for target in row]
    for own_R, target in zip(torch.split(rows_R, counts), row, strict=True):
        parts = [hidden_TD, *(outputs[layer] for layer in target.layers)]
        for part_TD, out_RD in zip(parts, target.out_RC.chunk(len(parts), 1), strict=True):
            torch.index_select(part_TD.to(out_RD.dtype), 0, own_R, out=out_RD)


def _copy_rows(hidden_TD: Tensor, outputs: Mapping[int, Tensor], rows_R: Tensor, row: list[_Target]) -> None:
    """The same from a GPU, which is not waited for."""
    counts = [target.sequence.num_rows for target in row]
    final, *others = (torch.split(each.index_select(0, rows_R), counts) for each in (hidden_TD, *outputs.values()))
    taken = dict(zip(outputs, others, strict=True))
    for number, target in enumerate(row):
        # Side by side already on the device: columns are copied one by one from there.
        parts = [final[number], *(taken[layer][number] for layer in target.layers)]
        target.out_RC.copy_(torch.cat(parts, 1) if target.layers else final[number], non_blocking=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    contiguous = tensor.detach().cpu().contiguous()
    return contiguous.view(torch.uint8).reshape(-1).numpy().data.toreadonly()
