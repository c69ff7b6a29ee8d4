"""The student on one rank, whole and under FSDP2, over NCCL where there is a GPU: as it is without any of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.gpu.scale import Scale
from benchmarks.gpu.step import TINY, build_lm, descend, packed_tokens
from kdmesh.losses import FusedLoss, OutputHead, forward_kl, fused_linear_divergence
from kdmesh.models.attention import packed_attention
from kdmesh.models.images.packing import Packer
from kdmesh.models.packing import PackedTokens, moved
from kdmesh.types import TokenSequence
from kdmesh_trainer.mesh import Mesh, joined
from kdmesh_trainer.objectives.head import TeacherHead
from kdmesh_trainer.optimization.adamw import build_adamw
from kdmesh_trainer.student.compiled_layers import compile_layers
from kdmesh_trainer.student.model import Student, begin_micro_batch, release, shard
from kdmesh_trainer.student.weights import whole

if TYPE_CHECKING:
    from kdmesh_trainer.sections.parallel_config import Gather  # which needs pydantic

pytestmark = pytest.mark.gpu

SCALE = Scale(device=torch.device("cpu"), rows=64, vocabulary=300)
# Not an OptimizerConfig: that needs pydantic.
ADAMW = SimpleNamespace(learning_rate=1e-3, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0, moments="float32")


@pytest.fixture(scope="module")
def mesh(device: torch.device) -> Iterator[Mesh]:
    with joined("cpu" if device.type == "cpu" else "cuda", longest_wait_s=60) as mesh:
        yield mesh


def built(*, is_varlen: bool = False) -> Student:
    torch.manual_seed(3)
    lm = build_lm(SCALE.vocabulary, TINY, torch.device("cpu"), torch.float32)
    return Student(lm, vocabulary_size=SCALE.vocabulary, is_varlen=is_varlen)


def random_sequences() -> list[TokenSequence]:
    """Of several lengths, with every position."""
    random = np.random.default_rng(2)
    return [
        TokenSequence(
            token_ids=random.integers(0, SCALE.vocabulary, length).astype(np.int32),
            positions=np.arange(length - 1, dtype=np.int32),
        )
        for length in (19, 2, 40)
    ]


def loss_and_gradients(
    student: Student, packed: PackedTokens, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    teacher = OutputHead(weight_VD=torch.randn(SCALE.vocabulary, 24, generator=generator).to(device, dtype))
    rows_RE = torch.randn(packed.num_rows, 24, generator=generator).to(device, dtype)

    def row_loss(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
        return fused_linear_divergence(hidden_RD, head, rows_RE, teacher, divergence=forward_kl, labels_R=labels_R)

    loss_sum = student(packed, row_loss).loss_sum
    loss_sum.backward()
    gradients = {}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name] = whole.cpu()
    return loss_sum.detach().cpu(), gradients


@pytest.mark.parametrize("gather", ["auto", "micro_batch"])  # whole, and with FSDP
def test_loss_and_gradient_are_those_of_a_cpu(
    mesh: Mesh, device: torch.device, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tokens(SCALE)
    student = built()
    shard(student, mesh.device_mesh, compute_dtype=torch.float32, gather=gather)
    assert isinstance(student, FSDPModule) is (gather == "micro_batch")
    begin_micro_batch(student, is_last=True)
    loss, gradients = loss_and_gradients(student, packed.to(device), device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the reference is torch's operators' in either case
    reference, reference_gradients = loss_and_gradients(built(), packed, torch.device("cpu"))
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=0)
    for name, gradient in reference_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


def learnt(mesh: Mesh, device: torch.device, *, offloads: bool) -> tuple[Student, torch.optim.Optimizer, list[Tensor]]:
    """A student after two steps, and its whole weights."""
    student, packed = built(), packed_tokens(SCALE)
    shard(student, mesh.device_mesh, compute_dtype=torch.float32, offloads=offloads)
    optimizer = build_adamw(student, ADAMW)  # type: ignore[arg-type]
    for _ in range(2):
        begin_micro_batch(student, is_last=True)
        loss_and_gradients(student, packed.to(device), device)
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    release(student)
    return student, optimizer, [whole(parameter, None) for parameter in student.parameters()]


def test_a_student_on_the_host_learns_the_same_and_stays_there(mesh: Mesh, device: torch.device) -> None:
    _, _, expected = learnt(mesh, device, offloads=False)
    student, optimizer, weights = learnt(mesh, device, offloads=True)
    for parameter, weight, other in zip(student.parameters(), weights, expected, strict=True):
        assert (weight.device.type, other.device.type) == (device.type, device.type)  # servers get it from there
        assert (weight - other).square().mean().sqrt() < 1e-5  # after two steps of 1e-3
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().device.type == "cpu"
        assert parameter.to_local().is_pinned() is (device.type == "cuda")
        assert optimizer.state[parameter]["exp_avg"].to_local().device.type == "cpu"


def test_a_student_on_the_host_leaves_the_device_free(mesh: Mesh, gpu: torch.device) -> None:
    before = torch.cuda.memory_allocated()
    student = built()
    shard(student, mesh.device_mesh, compute_dtype=torch.bfloat16, offloads=True)
    assert torch.cuda.memory_allocated() - before < student.size_bytes / 4


@pytest.mark.parametrize("is_varlen", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("gather", ["auto", "micro_batch"])
def test_a_step_waits_for_nothing_until_its_figures_are_read(
    mesh: Mesh, gpu: torch.device, gather: Gather, is_compiled: bool, is_varlen: bool
) -> None:
    sequences = random_sequences()
    student = built(is_varlen=is_varlen)
    if is_compiled:
        compile_layers(student.lm)
    shard(student, mesh.device_mesh, compute_dtype=torch.bfloat16, gather=gather)
    optimizer = build_adamw(student, ADAMW)  # type: ignore[arg-type]
    own_head = OutputHead(weight_VD=torch.randn(SCALE.vocabulary, 24).bfloat16())
    service = SimpleNamespace(head=lambda: (own_head, 1))
    teacher_head = TeacherHead(service, vocabulary_size=SCALE.vocabulary, device=gpu)
    rows = SimpleNamespace(rows_RD=torch.randn(sum(s.num_rows for s in sequences), 24).bfloat16(), weight_version=1)

    def row_loss(hidden_RD: Tensor, head: OutputHead, labels_R: Tensor) -> FusedLoss:
        teacher = teacher_head.teacher(rows, 1.0)
        return fused_linear_divergence(
            hidden_RD, head, teacher.hidden_RE, teacher.head, divergence=forward_kl, labels_R=labels_R
        )

    for turn in range(3):
        begin_micro_batch(student, is_last=True)
        if turn == 2:  # the first compile and allocate
            torch.cuda.set_sync_debug_mode("error")
        try:
            student(student.pack(sequences).to(gpu), row_loss).loss_sum.backward()
            descend(student, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_row_without_an_image_reaches_a_gpu_that_sees_images(gpu: torch.device) -> None:
    reader = SimpleNamespace(blank=lambda: (torch.rand(4, 8), torch.tensor([[1, 2, 2]])), token_id=7)
    for sequences in (random_sequences(), []):
        packed = Packer(SimpleNamespace(), reader, always_sees=True).pack(sequences)  # type: ignore[arg-type]
        there = packed.to(gpu)
        assert packed.images is not None
        assert there.images is not None
        assert torch.equal(there.images.position_ids_3T.cpu(), packed.images.position_ids_3T)


@pytest.mark.parametrize("is_pinned", [False, True])
def test_what_is_sent_to_a_gpu_may_change_at_once(gpu: torch.device, is_pinned: bool) -> None:
    own = torch.ones(1 << 24, pin_memory=is_pinned)
    torch.cuda._sleep(100_000_000)  # the copy begins after the change
    there = moved(own, gpu)
    own.zero_()
    assert there.min().item() == 1
    assert torch.equal(moved(torch.arange(4).expand(3, -1), gpu).cpu(), torch.arange(4).expand(3, -1))


def test_sampled_tokens_are_looked_at_without_a_wait(mesh: Mesh, gpu: torch.device) -> None:
    pytest.importorskip("PIL")
    from kdmesh_trainer.tally import Tally

    per_row = [torch.rand(6, device=gpu) for _ in range(6)]
    loss = FusedLoss.of(torch.zeros([], device=gpu), per_row)
    tally = Tally(mesh)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally.look_at_samples(loss, torch.rand(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tokens_of_rows_are_looked_up_without_a_wait(gpu: torch.device) -> None:
    pytest.importorskip("PIL")
    from kdmesh_trainer.algorithms.dskd_attention import _tokens

    head = OutputHead(weight_VD=torch.randn(SCALE.vocabulary, 8, device=gpu))
    sequences = tuple(random_sequences())
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = _tokens(sequences, head, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.shape == (sum(sequence.num_rows for sequence in sequences), 16)


@pytest.mark.parametrize("before", [0, 30])
@pytest.mark.parametrize("window", [None, 5])
def test_one_call_for_all_sequences_attends_as_each_alone(gpu: torch.device, window: int | None, before: int) -> None:
    lengths = (40, 1, 23)
    generator = torch.Generator().manual_seed(1)

    def states(heads: int, length: int) -> Tensor:
        whole = torch.randn(1, heads, length, 64, generator=generator).to(gpu, torch.bfloat16)
        return whole.requires_grad_()

    inputs = states(8, sum(lengths)), states(2, before + sum(lengths)), states(2, before + sum(lengths))
    starts = torch.tensor([0, 40, 41, 64], dtype=torch.int32, device=gpu)
    settings = {"sliding_window": window, "packed_lengths": lengths, "packed_before": before}
    upstream = torch.randn(1, sum(lengths), 8, 64, generator=generator).to(gpu, torch.bfloat16)
    each, together = (
        packed_attention(torch.nn.Identity(), *inputs, None, packed_starts=told, **settings)[0]
        for told in (None, starts)
    )
    torch.testing.assert_close(together, each, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(
        torch.autograd.grad(together, inputs, upstream), torch.autograd.grad(each, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)


def test_a_long_sequence_in_float32_never_has_all_its_scores(gpu: torch.device) -> None:
    heads, length = 8, 8192
    query, key, value = (torch.randn(1, count, length, 64, device=gpu).requires_grad_() for count in (heads, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_attention(torch.nn.Identity(), query, key, value, None, packed_lengths=(length,))[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length**2  # bytes: a quarter of the scores


@pytest.mark.parametrize(
    ("dtype", "is_varlen", "of_loss", "of_gradient"),
    [(torch.float32, False, 1e-4, 1e-3), (torch.bfloat16, True, 2e-3, 4e-2)],  # compiled kernels round less often
)
def test_compiled_layers_have_the_gradient_of_the_others_at_any_lengths(
    mesh: Mesh, gpu: torch.device, dtype: torch.dtype, is_varlen: bool, of_loss: float, of_gradient: float
) -> None:
    torch.compiler.reset()  # of what other tests have compiled, some is for nearly the same
    outcomes = []
    for is_compiled in (False, True):
        student = built(is_varlen=is_varlen)
        if is_compiled:
            compile_layers(student.lm)
        shard(student, mesh.device_mesh, compute_dtype=dtype)
        begin_micro_batch(student, is_last=True)
        loss_and_gradients(student, student.pack(random_sequences()).to(gpu), gpu, dtype)
        student.zero_grad(set_to_none=True)
        begin_micro_batch(student, is_last=True)
        packed = packed_tokens(SCALE, together=is_varlen).to(gpu)
        with torch.compiler.set_stance("fail_on_recompile" if is_compiled else "default"):
            outcomes.append(loss_and_gradients(student, packed, gpu, dtype))
    (loss, gradients), (compiled_loss, compiled_gradients) = outcomes
    torch.testing.assert_close(compiled_loss, loss, rtol=of_loss, atol=0)
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() / gradient.norm() < of_gradient, name
