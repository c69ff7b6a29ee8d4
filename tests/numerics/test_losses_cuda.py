"""The fused loss on a GPU: the same numbers, and never a wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kdmesh.losses import OutputHead, Workspace, fused_linear_divergence
from tests.support.loss_cases import FULL, Case, Outcome, Tensors, assert_same, expected, run, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CASE = replace(FULL, rows=300, vocabulary=1000, student_size=64, teacher_size=128, chunk_tokens=128)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(inputs: Tensors) -> Tensors:
    """Copies; the student's are leaves again."""

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    return Tensors(**{name: move(getattr(inputs, name)) for name in Tensors.__dataclass_fields__})  # type: ignore[arg-type]


def on_cpu(outcome: Outcome) -> Outcome:
    return Outcome(
        loss_sum=outcome.loss_sum.cpu(),
        divergence_R=outcome.divergence_R.cpu(),
        cross_entropy_R=outcome.cross_entropy_R.cpu(),
        gradients=[gradient.cpu() for gradient in outcome.gradients],
    )


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)]
)
def test_a_gpu_gives_the_textbooks_values_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = replace(CASE, name=name)
    inputs = tensors(case, dtype)
    assert_same(on_cpu(run(case, on_gpu(inputs))), expected(case, inputs), tolerance=tolerance)


def test_nothing_waits_for_the_device(no_waiting: None) -> None:
    inputs = on_gpu(tensors(replace(CASE, has_bias=False), torch.bfloat16))
    head = OutputHead(weight_VD=inputs.student_weight_VD, logit_softcap=5.0)
    teacher = OutputHead(weight_VD=inputs.teacher_weight_VE)
    workspace = Workspace()
    for _ in range(2):
        loss = fused_linear_divergence(
            inputs.student_hidden_RD,
            head,
            inputs.teacher_hidden_RE,
            teacher,
            divergence=Case().divergence,
            temperature=2.0,
            labels_R=inputs.labels_R,
            ce_weight=0.5,
            token_weight_R=inputs.token_weight_R,
            workspace=workspace,
        )
        (loss.loss_sum * 0.5).backward()  # type: ignore[no-untyped-call]
