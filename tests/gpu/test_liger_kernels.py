"""A student whose parts are Liger's kernels has the gradient of one whose are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from benchmarks.gpu.step import packed_tokens
from kdmesh_trainer.mesh import joined
from kdmesh_trainer.student.model import begin_micro_batch, shard
from tests.gpu.test_student import SCALE, built, loss_and_gradients

pytestmark = pytest.mark.gpu


@pytest.fixture
def own_qwen3() -> Iterator[None]:
    """The model's classes again as they were: Liger puts its own into transformers' module as well."""
    before = dict(vars(modeling_qwen3))
    yield
    vars(modeling_qwen3).update(before)


@pytest.mark.usefixtures("own_qwen3")
def test_loss_and_gradient_are_those_without(gpu: torch.device) -> None:
    pytest.importorskip("liger_kernel")
    from kdmesh_trainer.student.liger import use_liger_kernels

    packed = packed_tokens(SCALE).to(gpu)
    outcomes = []
    with joined("cuda", longest_wait_s=60) as mesh:
        for is_liger in (False, True):  # in this order: rotary embeddings are exchanged for the whole process
            student = built()
            if is_liger:
                use_liger_kernels(student.lm)
            shard(student, mesh.device_mesh, compute_dtype=torch.float32)
            begin_micro_batch(student, is_last=True)
            outcomes.append(loss_and_gradients(student, packed, gpu))
    (loss, gradients), (liger_loss, liger_gradients) = outcomes
    torch.testing.assert_close(liger_loss, loss, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        assert (liger_gradients[name] - gradient).norm() / gradient.norm() < 1e-3, name
