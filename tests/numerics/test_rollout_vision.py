"""Responses to images are sampled from the model's own distribution, many at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdmesh.types import Sample, Sampling, TokenSequence
from kdmesh_rollout import config
from kdmesh_rollout.engine import Order
from kdmesh_rollout.transformers_engine import TransformersEngine
from tests.support.reference_vision import hugging_face_inputs, hugging_face_model
from tests.support.row_families import ROW_FAMILIES
from tests.support.tiny_vision import HYBRIDS, TinyVisionModels, png, reader_of, vision_sequence


def sampled(path: Path, prompts: list[TokenSequence], **settings: Any) -> list[Sample]:
    """A sample of each prompt and a second of the first, which join one step after the other."""
    runner = TransformersEngine(config.TransformersEngine(model=path, device="cpu", **settings))
    runner.load()
    finished = {}
    for key, prompt in enumerate([*prompts, prompts[0]]):
        sampling = Sampling(max_new_tokens=8 + 3 * key, temperature=1.5)
        runner.add(Order(key=key, prompt_ids=prompt.token_ids, sampling=sampling, seed=key, images=prompt.images))
        if key == 1:
            finished |= {one.key: one.sample for one in runner.step()}
    while runner.num_running:
        finished |= {one.key: one.sample for one in runner.step()}
    return [finished[key] for key in sorted(finished)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", *HYBRIDS, *ROW_FAMILIES])
def test_logprobs_after_images_are_those_of_hugging_face(family: str, tiny_vision: TinyVisionModels) -> None:
    path = tiny_vision.path(family)
    reader = reader_of(path)
    prompts = [
        vision_sequence(reader, 5, png(24, 40, seed=1), 6, png(32, 32, seed=2), 4, seed=1),
        vision_sequence(reader, 9, seed=2),
        vision_sequence(reader, 2, png(64, 48, seed=3), 6, seed=3),
    ]
    model = hugging_face_model(path)
    for is_deterministic in (False, True):
        samples = sampled(path, prompts, deterministic=is_deterministic)
        for prompt, sample in zip([*prompts, prompts[0]], samples, strict=True):
            ids = np.concatenate([prompt.token_ids, sample.token_ids])
            whole = replace(prompt, token_ids=ids, positions=np.array([0], np.int32))
            with torch.no_grad():
                log_p_TV = model(**hugging_face_inputs(path, whole)).logits[0].log_softmax(-1)
            places = torch.arange(prompt.num_tokens - 1, len(ids) - 1)
            expected = log_p_TV[places, torch.from_numpy(sample.token_ids).long()]
            torch.testing.assert_close(torch.from_numpy(sample.logprobs), expected, rtol=1e-3, atol=1e-3)
            assert reader.token_id not in sample.token_ids
