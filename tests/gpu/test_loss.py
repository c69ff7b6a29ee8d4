"""The fused loss where its elementwise half is the Triton kernel: the textbook's numbers, and no wait for the device.

Small cases, of several blocks of columns, run in Triton's interpreter as well; on a GPU the same ones are larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdmesh.losses import (
    MixedTeacher,
    OutputHead,
    Workspace,
    build_divergence,
    fused_linear_cross_entropy,
    fused_linear_divergence,
)
from kdmesh.losses.gpu import rows as kernel_rows
from kdmesh.losses.gpu.form import Op, kernel_form
from kdmesh.losses.matmul import scaled
from tests.support import mixture_cases as mixture
from tests.support import textbook_losses as textbook
from tests.support.loss_cases import (
    DIVERGENCES,
    FULL,
    Case,
    Outcome,
    Tensors,
    assert_same,
    call,
    expected,
    heads,
    run,
    tensors,
)
from tests.support.mixture_cases import Further
from tests.support.relative_error import relative_error
from tests.support.textbook_losses import Transform

pytestmark = pytest.mark.gpu

IN_KERNEL = [name for name in DIVERGENCES if kernel_form(Case(name=name).divergence) is not None]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[kernel_rows.Launch]:
    """Every launch of the kernel; in the interpreter, a row has several blocks although it is short."""
    if device.type == "cpu":
        monkeypatch.setattr(kernel_rows, "_BLOCK", 64)
    seen: list[kernel_rows.Launch] = []
    launch = kernel_rows._run

    def noted(given: kernel_rows.Launch) -> None:
        seen.append(given)
        launch(given)

    monkeypatch.setattr(kernel_rows, "_run", noted)
    return seen


def sized(case: Case, device: torch.device) -> Case:
    """The case, larger where there is a GPU."""
    if device.type == "cpu":
        return replace(case, rows=3, vocabulary=100, chunk_tokens=2)
    return replace(case, rows=300, vocabulary=9000, student_size=64, teacher_size=128, chunk_tokens=128)


def moved(inputs: Tensors, device: torch.device) -> Tensors:
    """Copies on the device; the student's are leaves again."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    return Tensors(**{name: move(getattr(inputs, name)) for name in Tensors.__dataclass_fields__})  # type: ignore[arg-type]


def on_cpu(outcome: Outcome) -> Outcome:
    return Outcome(
        loss_sum=outcome.loss_sum.cpu(),
        divergence_R=outcome.divergence_R.cpu(),
        cross_entropy_R=outcome.cross_entropy_R.cpu(),
        gradients=[gradient.cpu() for gradient in outcome.gradients],
    )


@pytest.mark.parametrize("name", IN_KERNEL)
def test_every_option_at_once_is_the_textbooks(
    name: str, device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    case = sized(replace(FULL, name=name, knob=0.3), device)
    inputs = tensors(case, torch.float32)
    assert_same(on_cpu(run(case, moved(inputs, device))), expected(case, inputs), tolerance=1e-4)
    assert len(launches) > 1


@pytest.mark.parametrize("name", IN_KERNEL)
def test_a_bfloat16_model_without_any_option_has_the_textbooks_values_and_rounded_gradients(
    name: str, device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    case = sized(Case(name=name, has_labels=name == "sampled_reverse_kl"), device)
    inputs = tensors(case, torch.bfloat16)
    outcome, reference = on_cpu(run(case, moved(inputs, device))), expected(case, inputs)
    torch.testing.assert_close(outcome.divergence_R.double(), reference.divergence_R.double(), rtol=1e-4, atol=1e-5)
    assert outcome.gradients[0].dtype is torch.bfloat16
    for mine, theirs in zip(outcome.gradients, reference.gradients, strict=True):
        assert relative_error(mine, theirs) < 8e-3
    assert launches


@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 128, 200])
def test_any_vocabulary_is_as_good_as_one_that_fills_its_blocks(vocabulary: int, device: torch.device) -> None:
    scale = 1 if device.type == "cpu" else 77  # on a GPU 77 x 64 columns are a block and a part
    case = replace(Case(), rows=3, vocabulary=vocabulary * scale, padding=3, name="jensen_shannon")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        inputs = tensors(case, dtype)
        assert_same(on_cpu(run(case, moved(inputs, device))), expected(case, inputs), tolerance=tolerance)


@pytest.mark.parametrize("scales", [(1.0, 0.25), (0.25, 1.0)])
def test_places_beyond_the_vocabulary_are_nothing_whatever_the_logits_scales(
    scales: tuple[float, float], device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    student, teacher = (Transform(scale=scale) for scale in scales)
    case = sized(replace(Case(), name="renyi", knob=0.95, student=student, teacher=teacher), device)
    inputs = tensors(case, torch.float32)
    assert_same(on_cpu(run(case, moved(inputs, device))), expected(case, inputs), tolerance=1e-4)
    assert launches


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skewed_reverse_kl"])
def test_the_gradient_is_right_to_its_own_rounding_however_near_the_teacher(name: str, device: torch.device) -> None:
    case = sized(replace(Case(), name=name, has_labels=False, spread=4.0), device)
    inputs = tensors(case, torch.bfloat16)
    noise_RD = torch.randn(inputs.student_hidden_RD.shape, generator=torch.Generator().manual_seed(1))
    teacher = (inputs.student_hidden_RD.detach() + 0.05 * noise_RD).bfloat16()
    inputs = replace(inputs, teacher_hidden_RE=teacher, teacher_weight_VE=inputs.student_weight_VD.detach())
    outcome, reference = on_cpu(run(case, moved(inputs, device))), expected(case, inputs)
    assert relative_error(outcome.gradients[0], reference.gradients[0]) < 6e-3


@pytest.mark.parametrize("name", ["jensen_shannon", "skewed_kl", "skewed_reverse_kl"])
def test_what_only_one_of_the_two_ever_says_counts_by_its_share_of_the_mixture(
    name: str, device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    case = sized(Case(name=name, knob=0.3, has_labels=False, has_bias=True), device)
    inputs = tensors(case, torch.float32)
    assert inputs.student_bias_V is not None and inputs.teacher_bias_V is not None
    inputs.student_bias_V.data[10:20] = -1e7
    inputs.teacher_bias_V[15:25] = -1e7
    student, teacher = heads(case, inputs)
    log_q_RV = student.logits(inputs.student_hidden_RD.detach()).double().log_softmax(-1)
    log_p_RV = teacher.logits(inputs.teacher_hidden_RE).double().log_softmax(-1)
    assert callable(case.divergence)
    exact_R, _ = case.divergence(log_q_RV.detach(), log_p_RV)
    loss = call(case, moved(inputs, device))
    torch.testing.assert_close(loss.divergence_R.cpu().double(), exact_R, rtol=1e-4, atol=1e-5)
    assert launches


@pytest.mark.parametrize("tail_mass", [1e-4, 0.3, 0.5, 0.7])
def test_the_tail_is_found_among_equals_and_extremes(
    tail_mass: float, device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    generator = torch.Generator().manual_seed(4)
    teacher_RV = torch.randn(6, 150, generator=generator)
    teacher_RV[0] = 1.0  # all of one probability
    teacher_RV[1] = (torch.arange(150) % 3).float()  # three probabilities
    teacher_RV[2] *= 40.0  # next to nothing but one token
    teacher_RV[3, 7] += 20.0
    teacher_RV[4] = torch.linspace(-1e-4, 1e-4, 150)  # as near to each other as float32 can tell
    student_RV = torch.randn(6, 150, generator=generator)
    divergence = build_divergence("adaptive_kl", {"tail_mass": tail_mass})
    assert callable(divergence)

    def head(logits_RV: Tensor) -> OutputHead:  # the logits of rows that each have a 1 in a place of their own
        return OutputHead(weight_VD=logits_RV.T.contiguous())

    rows_RR = torch.eye(6)
    loss = fused_linear_divergence(
        rows_RR.to(device),
        head(student_RV.to(device)),
        rows_RR.to(device),
        head(teacher_RV.to(device)),
        divergence=divergence,
    )
    exact_R, _ = divergence(student_RV.double().log_softmax(-1), teacher_RV.double().log_softmax(-1))
    torch.testing.assert_close(loss.divergence_R.cpu().double(), exact_R, rtol=1e-4, atol=1e-6)
    assert launches


def test_what_the_kernel_has_no_form_for_is_computed_without_it(
    device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    assert set(DIVERGENCES) - set(IN_KERNEL) == {"hierarchical_ranking"}
    for case in (Case(name="hierarchical_ranking"), Case(kept=("top_k", 5.0))):
        inputs = tensors(case, torch.float32)
        assert_same(on_cpu(run(case, moved(inputs, device))), expected(case, inputs), tolerance=1e-4)
    double = tensors(Case(), torch.float64)
    assert_same(on_cpu(run(Case(), moved(double, device))), expected(Case(), double), tolerance=1e-11)
    assert not launches


def test_a_mixture_of_teachers_is_the_textbooks(device: torch.device, launches: list[kernel_rows.Launch]) -> None:
    case = sized(replace(FULL, padding=0), device)
    further = [Further(share=2.0, has_bias=True, transform=Transform(scale=0.7, softcap=8.0)), Further(size=7)]
    inputs = mixture.tensors(case, further, torch.float32)
    reference = mixture.expected(case, inputs)
    there = replace(
        inputs,
        own=moved(inputs.own, device),
        further=[
            MixedTeacher(
                hidden_RE=each.hidden_RE.to(device),
                head=replace(
                    each.head,
                    weight_VD=each.head.weight_VD.to(device),
                    bias_V=None if each.head.bias_V is None else each.head.bias_V.to(device),
                ),
                weight=each.weight,
            )
            for each in inputs.further
        ],
    )
    assert_same(on_cpu(mixture.run(case, there)), reference, tolerance=1e-4)
    assert launches


def test_cross_entropy_alone_is_the_textbooks(device: torch.device, launches: list[kernel_rows.Launch]) -> None:
    case = sized(Case(has_bias=True), device)
    inputs = tensors(case, torch.float32)
    there = moved(inputs, device)
    head, _ = heads(case, there)
    assert there.labels_R is not None and inputs.labels_R is not None and inputs.student_bias_V is not None
    loss = fused_linear_cross_entropy(there.student_hidden_RD, head, there.labels_R, chunk_tokens=case.chunk_tokens)
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    z_RV = textbook.logits(*leaves, Transform())
    reference_R = textbook.cross_entropy(z_RV, inputs.labels_R)
    torch.testing.assert_close(loss.cross_entropy_R.cpu().double(), reference_R.detach(), rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(loss.loss_sum, there.leaves)
    for gradient, theirs in zip(mine, torch.autograd.grad(reference_R.sum(), leaves), strict=True):
        assert relative_error(gradient.cpu(), theirs) < 1e-5
    assert {launch.constants["OP"] for launch in launches} == {int(Op.NOTHING)}


def test_what_is_reported_of_each_row_is_that_of_the_logits(
    device: torch.device, launches: list[kernel_rows.Launch]
) -> None:
    case = sized(replace(FULL, has_bias=True, student=Transform(softcap=20.0), teacher=Transform(scale=0.5)), device)
    inputs = tensors(case, torch.float32)
    loss = call(case, moved(inputs, device), with_entropies=True, top_k=8)
    student, teacher = heads(case, inputs)
    z_RV = student.logits(inputs.student_hidden_RD.detach())
    t_RV = teacher.logits(inputs.teacher_hidden_RE)
    for found_R, logits_RV in ((loss.student_entropy_R, z_RV), (loss.teacher_entropy_R, t_RV)):
        p_RV = textbook.softmax(logits_RV.double(), case.temperature)
        torch.testing.assert_close(found_R.cpu().double(), -(p_RV * p_RV.log()).sum(-1), rtol=1e-4, atol=1e-5)
    agrees_R = (z_RV.argmax(-1) == t_RV.argmax(-1)).float()
    assert torch.equal(loss.top1_agreement_R.cpu(), agrees_R)
    favourites = [logits_RV.topk(8).indices for logits_RV in (z_RV, t_RV)]
    shared_R = (favourites[0].unsqueeze(1) == favourites[1].unsqueeze(2)).any(-1).float().mean(-1)
    torch.testing.assert_close(loss.topk_overlap_R.cpu(), shared_R)
    assert launches


def test_a_model_agrees_with_itself(device: torch.device) -> None:
    case = sized(Case(spread=4.0), device)
    inputs = tensors(case, torch.float32)
    weight_VE = inputs.student_weight_VD.detach()
    same = replace(inputs, teacher_hidden_RE=inputs.student_hidden_RD.detach(), teacher_weight_VE=weight_VE)
    loss = call(case, moved(same, device))
    assert loss.divergence_R.abs().max() < 1e-6
    assert loss.top1_agreement_R.min() == 1


def test_without_a_gradient_the_values_are_the_same(device: torch.device) -> None:
    case = sized(replace(FULL, name="reverse_kl"), device)
    inputs = moved(tensors(case, torch.bfloat16), device)
    with torch.no_grad():
        plain = call(case, inputs)
    assert torch.equal(plain.loss_sum, call(case, inputs).loss_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upstream_gradient_is_multiplied_in_and_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    matrix = torch.randn(70, 61, generator=torch.Generator().manual_seed(1)).to(device)
    factor = torch.tensor(1 / 3, device=device)
    is_cut = device.type == "cpu" and dtype is torch.bfloat16  # by the interpreter, where a GPU rounds
    expected_as = {"rtol": 2.0**-7 if is_cut else 0.0, "atol": 0.0}
    torch.testing.assert_close(scaled(matrix, factor, dtype), (matrix * factor).to(dtype), **expected_as)


def test_a_workspace_that_held_other_numbers_changes_nothing(device: torch.device) -> None:
    case = sized(replace(FULL, name="jensen_shannon"), device)
    inputs = moved(tensors(case, torch.bfloat16), device)
    workspace = Workspace()
    first = call(case, inputs, workspace=workspace)
    for held in workspace._bytes.values():
        held.fill_(255)  # not a number, whatever the type
    second = call(case, inputs, workspace=workspace)
    assert torch.equal(first.loss_sum, second.loss_sum)
    gradients = [torch.autograd.grad(loss.loss_sum, inputs.leaves) for loss in (first, second)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("top_k", [0, 8])
def test_nothing_waits_for_the_device(top_k: int, gpu: torch.device, request: pytest.FixtureRequest) -> None:
    case = sized(FULL, gpu)
    inputs = moved(tensors(case, torch.bfloat16), gpu)
    workspace = Workspace()
    call(case, inputs, top_k=top_k, workspace=workspace)  # compiles
    request.getfixturevalue("no_waiting")
    for _ in range(2):
        loss = call(case, inputs, top_k=top_k, workspace=workspace)
        (loss.loss_sum * 0.5).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_writing_over_the_logits_races_with_nobody(name: str, gpu: torch.device) -> None:
    case = Case(rows=2048, vocabulary=30_001, student_size=64, teacher_size=64, name=name, has_labels=False)
    inputs = moved(tensors(case, torch.bfloat16), gpu)
    first = run(case, inputs)
    for _ in range(20):
        again = run(case, inputs)
        assert torch.equal(first.loss_sum, again.loss_sum)
        assert all(torch.equal(one, other) for one, other in zip(first.gradients, again.gradients, strict=True))


def test_no_rows_give_zeros(device: torch.device, launches: list[kernel_rows.Launch]) -> None:
    case = replace(Case(), rows=0)
    outcome = run(case, moved(tensors(case, torch.bfloat16), device))
    assert outcome.loss_sum == 0
    assert all(not gradient.any() for gradient in outcome.gradients)
    assert not launches
