"""The kernel writes the gradient over logits that other warps may have yet to read; they read them first."""

from __future__ import annotations

import pytest
import torch

from kdmesh.losses import OutputHead, forward_kl
from kdmesh.losses.gpu import rows as kernel_rows
from kdmesh.losses.gpu.form import KernelForm, Op
from kdmesh.losses.gpu.rows import KernelRows
from kdmesh.losses.rows import Mix, StudentSide

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", [Op.FORWARD_KL, Op.REVERSE_KL, Op.JENSEN_SHANNON])
@pytest.mark.parametrize("columns", [1000, 30_001, 151_936])
def test_a_gradient_written_over_the_logits_is_the_one_written_beside_them(
    op: Op, columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, rounds = 1024, 20
    if device.type == "cpu":
        rows, columns, rounds = 2, min(columns, 300), 1
        monkeypatch.setattr(kernel_rows, "_BLOCK", 64)
    padded = -(-columns // 128) * 128
    logits_CP = torch.randn(rows, padded, device=device)
    teacher_CV = torch.randn(rows, padded, device=device)[:, :columns]
    head = OutputHead(weight_VD=torch.empty(columns, 1, device=device))
    side = StudentSide(head=head, token_weight_R=None, bias_gradient_V=None)
    mix = Mix(divergence=forward_kl, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    maths = KernelRows(side, head, KernelForm(op=op, first=0.5), mix, None)
    beside_CV = torch.empty(rows, padded, dtype=torch.bfloat16, device=device)[:, :columns]
    kernel_rows._run(maths.launch(slice(0, rows), logits_CP[:, :columns], teacher_CV, beside_CV))
    assert beside_CV.abs().sum() > 0
    for _ in range(rounds):
        student_CP = logits_CP.clone()
        over_CV = student_CP.view(torch.bfloat16)[:, :columns]
        kernel_rows._run(maths.launch(slice(0, rows), student_CP[:, :columns], teacher_CV, over_CV))
        assert torch.equal(over_CV, beside_CV)
