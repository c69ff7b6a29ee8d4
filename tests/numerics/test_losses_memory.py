"""The fused loss never makes or keeps a [R, V] matrix, and its memory does not grow with R."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kdmesh.losses import OutputHead, Workspace, fused_linear_cross_entropy
from kdmesh.losses.workspace import default_workspace
from tests.support.loss_cases import DIVERGENCES, Case, Tensors, call, tensors
from tests.support.tensor_watch import SavedTensors, TensorWatch
from tests.support.textbook_losses import Transform

CHUNK = 32
CASE = Case(
    rows=400,
    vocabulary=500,
    student_size=8,
    teacher_size=12,
    temperature=2.0,
    kd_weight=0.5,
    ce_weight=0.5,
    has_token_weights=True,
    student=Transform(softcap=5.0, scale=0.5),
    has_bias=True,
    chunk_tokens=CHUNK,
)


def everything(inputs: Tensors) -> list[torch.Tensor]:
    return [
        tensor
        for tensor in (*inputs.leaves, inputs.teacher_hidden_RE, inputs.teacher_weight_VE, inputs.teacher_bias_V)
        if tensor is not None
    ]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_or_a_weight(name: str, dtype: torch.dtype) -> None:
    case = replace(CASE, name=name)
    inputs = tensors(case, dtype)
    with TensorWatch(everything(inputs)) as watch:
        loss = call(case, inputs, workspace=Workspace())
        (loss.loss_sum * 3).backward()  # type: ignore[no-untyped-call]
    assert watch.largest_bytes <= 4 * max(CHUNK * case.vocabulary, case.vocabulary * 12, case.rows * 12)
    assert watch.largest_bytes < case.rows * case.vocabulary  # a byte per logit


def test_cross_entropy_alone_makes_no_larger_tensor_either() -> None:
    inputs = tensors(CASE, torch.float32)
    assert inputs.labels_R is not None
    with TensorWatch(everything(inputs)) as watch:
        head = OutputHead(weight_VD=inputs.student_weight_VD)
        loss = fused_linear_cross_entropy(
            inputs.student_hidden_RD, head, inputs.labels_R, chunk_tokens=CHUNK, workspace=Workspace()
        )
        loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert watch.largest_bytes <= 4 * CHUNK * CASE.vocabulary


def test_autograd_keeps_the_gradients_and_nothing_else() -> None:
    inputs = tensors(CASE, torch.float32)
    with SavedTensors() as saved:
        call(CASE, inputs)
    assert sorted(saved.numels) == sorted(leaf.numel() for leaf in inputs.leaves)


PER_ROW_BYTES = 2 * CASE.student_size * 4 + 8 * 4  # hidden's gradient twice, and per-row values


def peak_bytes(case: Case, dtype: torch.dtype) -> int:
    inputs = tensors(case, dtype)
    with TensorWatch(everything(inputs)) as watch:
        (call(case, inputs, workspace=Workspace()).loss_sum * 3).backward()  # type: ignore[no-untyped-call]
    return watch.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_grows_with_rows_by_the_outputs_alone(dtype: torch.dtype) -> None:
    few, many = (replace(CASE, rows=rows) for rows in (200, 1600))
    assert peak_bytes(many, dtype) <= peak_bytes(few, dtype) + (many.rows - few.rows) * PER_ROW_BYTES
    assert peak_bytes(many, dtype) < many.rows * CASE.vocabulary  # even a byte per logit would be more


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_peak_of_every_divergence_grows_no_more(name: str) -> None:
    few, many = (peak_bytes(replace(CASE, name=name, rows=rows), torch.float32) for rows in (100, 400))
    assert many <= few + 300 * PER_ROW_BYTES


def test_only_gradients_that_are_wanted_are_made() -> None:
    inputs = tensors(replace(CASE, has_bias=False), torch.float32)
    head_numel = inputs.student_weight_VD.numel()
    inputs.student_weight_VD.requires_grad_(False)
    case = replace(CASE, has_bias=False)
    with SavedTensors() as saved:
        loss = call(case, inputs)
    assert saved.numels == [inputs.student_hidden_RD.numel()]
    loss.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert inputs.student_hidden_RD.grad is not None

    inputs.student_hidden_RD.requires_grad_(False)
    inputs.student_weight_VD.requires_grad_(True)
    with SavedTensors() as saved:
        call(case, inputs).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert saved.numels == [head_numel]


def test_without_grad_only_values_are_made() -> None:
    inputs = tensors(CASE, torch.float32)
    with torch.no_grad(), TensorWatch(everything(inputs)) as watch:
        quiet = call(CASE, inputs, workspace=Workspace())
    with TensorWatch(everything(inputs)) as watch_with_gradient:
        loss = call(CASE, inputs, workspace=Workspace())
    assert not quiet.loss_sum.requires_grad
    assert torch.equal(quiet.loss_sum, loss.loss_sum)
    assert torch.equal(quiet.divergence_R, loss.divergence_R)
    spared = sum(leaf.numel() for leaf in inputs.leaves) + CHUNK * CASE.vocabulary
    assert watch.peak_bytes <= watch_with_gradient.peak_bytes - 4 * spared


def test_a_workspace_is_used_again_and_changes_nothing() -> None:
    workspace = Workspace()
    inputs = tensors(CASE, torch.bfloat16)
    assert inputs.labels_R is not None
    labels_R, head = inputs.labels_R, OutputHead(weight_VD=inputs.student_weight_VD)

    def gradients(workspace: Workspace) -> tuple[torch.Tensor, ...]:
        loss = fused_linear_cross_entropy(
            inputs.student_hidden_RD, head, labels_R, chunk_tokens=CHUNK, workspace=workspace
        )
        return torch.autograd.grad(loss.loss_sum, inputs.leaves[:2])

    def product() -> torch.Tensor:
        return workspace.matrix("product 0", CHUNK, CASE.vocabulary, dtype=torch.float32, device=torch.device("cpu"))

    fresh = gradients(Workspace())
    first, held = gradients(workspace), product()
    second = gradients(workspace)
    assert product().data_ptr() == held.data_ptr()  # and held is alive, so nothing else can be there
    for a, b, c in zip(fresh, first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_a_thread_keeps_its_scratch_from_call_to_call_and_no_other_thread_gets_it() -> None:
    cpu = torch.device("cpu")
    mine = default_workspace(cpu)
    assert default_workspace(cpu) is mine
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(default_workspace, cpu).result()
    assert theirs is not mine
    inputs = tensors(CASE, torch.float32)
    first = call(CASE, inputs)  # leaves its last block in the scratch
    other_inputs = tensors(replace(CASE, seed=1), torch.float32)
    call(CASE, other_inputs)
    again = call(CASE, inputs)
    assert torch.equal(first.divergence_R, again.divergence_R)
    assert torch.equal(first.loss_sum, again.loss_sum)
