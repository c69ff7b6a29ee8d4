"""Whole jobs whose student and teacher have attention sinks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kdmesh.models.body import hidden_states_TD, load_causal_lm
from kdmesh.models.packing import pack
from tests.support.sequences import random_sequences
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels
from tests.support.trainer_jobs import run_whole_and_in_parts


def test_a_job_of_two_ranks_goes_on_and_writes_a_model_that_transformers_runs_by_itself(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    student, teacher = tiny_models.path("gpt_oss", seed=1), tiny_models.path("gpt_oss", seed=2)
    final = run_whole_and_in_parts(tmp_path, student=student, teacher=teacher) / "final"
    origin, alone = (AutoModelForCausalLM.from_pretrained(p, attn_implementation="eager") for p in (student, final))
    before, after = dict(origin.named_parameters()), dict(alone.named_parameters())
    assert before.keys() == after.keys() and any(name.endswith(".sinks") for name in after)
    assert not any(torch.equal(after[name], parameter) for name, parameter in before.items())
    (sequence,) = random_sequences((40,), vocabulary_size=VOCABULARY_SIZE)
    own = load_causal_lm(final, "auto", torch.device("cpu"))
    with torch.no_grad():
        logits_TV = own.lm_head(hidden_states_TD(own, pack([sequence])))
        expected_TV = alone(torch.from_numpy(sequence.token_ids).long()[None]).logits[0]
    assert float((logits_TV - expected_TV).norm() / expected_TV.norm()) < 1e-5
