"""Log-probabilities of samples by the forward that a trainer runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdmesh.models.body import load_causal_lm
from kdmesh.models.forward import hidden_states_TD
from kdmesh.models.head import output_head
from kdmesh.models.packing import pack
from kdmesh.types import Int32Array, Sample, TokenSequence
from tests.support.tiny_models import VOCABULARY_SIZE


def student(path: Path) -> PreTrainedModel:
    """The model in a directory, in the element type of its files."""
    return load_causal_lm(path, "auto", torch.device("cpu"))


def forward_logprobs(model: PreTrainedModel, prompt_ids: Int32Array, sample: Sample) -> Tensor:
    """[N] of the sample's tokens, over real tokens."""
    ids = np.concatenate([prompt_ids, sample.token_ids])
    sequence = TokenSequence(token_ids=ids, positions=np.arange(len(prompt_ids) - 1, len(ids) - 1, dtype=np.int32))
    with torch.no_grad():
        packed = pack([sequence])
        rows_RD = hidden_states_TD(model, packed).index_select(0, packed.rows_R)
        logits_RV = output_head(model).sliced(VOCABULARY_SIZE).logits(rows_RD)
    labels_R = torch.from_numpy(sequence.labels.astype(np.int64))
    return logits_RV.log_softmax(-1).gather(1, labels_R[:, None])[:, 0]
