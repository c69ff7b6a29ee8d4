"""Stands in for SGLang's CPU kernels of linear attention: the same results, in torch alone, sequence by sequence.

H are key heads, V value heads; a slot holds the state of one sequence. Those of SGLang's `ops` are declared beside
their functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, rms_norm, silu, softplus


def causal_conv1d_fn_cpu(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    **kwargs: Any,
) -> Tensor:
    """[channels, T] of the same, sequences end to end; leaves the newest inputs of each in its slot."""
    assert activation == "silu"
    _replace_triton_kernels()
    outputs = torch.empty_like(inputs)
    starts = query_start_loc.tolist()
    for place, slot in enumerate(cache_indices.tolist()):
        part = slice(starts[place], starts[place + 1])
        before = conv_states[slot] if has_initial_state[place] else torch.zeros_like(conv_states[slot])
        outputs[:, part], conv_states[slot] = _convolved(inputs[:, part], before, weight, bias)
    return outputs


def causal_conv1d_update_cpu(
    inputs: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    conv_state_indices: Tensor,
) -> Tensor:
    """[B, channels] of the same: one token of each sequence."""
    assert activation == "silu"
    outputs = torch.empty_like(inputs)
    for place, slot in enumerate(conv_state_indices.tolist()):
        output, conv_states[slot] = _convolved(inputs[place][:, None], conv_states[slot], weight, bias)
        outputs[place] = output[:, 0]
    return outputs


def chunk_gated_delta_rule_cpu(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    head_first: bool,
) -> tuple[Tensor, None, None]:
    """([1, T, V, dim], None, None) of q and k [1, T, H, dim] and v [1, T, V, dim]; leaves each state in its slot."""
    assert use_qk_l2norm_in_kernel
    assert not head_first
    outputs = torch.empty_like(v)
    starts = cu_seqlens.tolist()
    for place, slot in enumerate(initial_state_indices.tolist()):
        part = slice(starts[place], starts[place + 1])
        outputs[0, part] = _delta_rule(
            q[0, part], k[0, part], v[0, part], g[0, part], beta[0, part], initial_state[slot]
        )
    return outputs, None, None


def _replace_triton_kernels() -> None:
    """Of what comes behind a first convolution SGLang takes Triton kernels on every CPU without AMX."""
    from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
    from sglang.srt.models import qwen2_moe

    fused_norm_gate._use_cpu = layernorm_gated._use_cpu = True
    qwen2_moe.fused_gate_sigmoid_mul_add = _gate_add


def _gate_add(hidden: Tensor, gate_weight: Tensor, shared: Tensor, outputs: Tensor) -> None:
    outputs += (hidden @ gate_weight).sigmoid()[:, None] * shared


def _update(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> Tensor:
    g, beta = _gates(A_log, a, b, dt_bias)
    outputs, _, _ = chunk_gated_delta_rule_cpu(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=initial_state_source,
        initial_state_indices=initial_state_indices,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        head_first=False,
    )
    return outputs.transpose(0, 1)


def _gates(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    return (-A_log.float().exp() * softplus(a.float() + dt_bias))[None], b.sigmoid()[None]


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """[T, V, dim] of one sequence; `state`, [V, value dim, key dim], becomes that behind its last token."""
    copies = v.shape[1] // k.shape[1]
    q, k = (_l2norm(heads.float()).repeat_interleave(copies, dim=1) for heads in (q, k))
    q = q * q.shape[-1] ** -0.5
    outputs = torch.empty_like(v)
    now = state.float()
    for token in range(len(v)):
        now = now * g[token].float().exp()[:, None, None]
        missing = v[token].float() - (now * k[token][:, None]).sum(-1)
        now = now + (missing * beta[token].float()[:, None])[:, :, None] * k[token][:, None]
        outputs[token] = (now * q[token][:, None]).sum(-1)
    state.copy_(now)
    return outputs


def _convolved(inputs: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs, and the newest inputs; `before` are those that come before these."""
    whole = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
    return silu(conv1d(whole, weight[:, None], bias, groups=len(whole))), whole[:, -before.shape[-1] :]


def _l2norm(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt((heads * heads).sum(-1, keepdim=True) + 1e-6)


def _gemma_norm(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(heads.float(), heads.shape[-1:], 1 + weight.float(), eps).to(heads.dtype)


def _norm_gated(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
    normed = weight * rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    return (normed * silu(z.float())).to(x.dtype)


def _sigmoid_mul(x: Tensor, gate: Tensor) -> None:
    x.mul_(gate.sigmoid())


def _norm_with_gate(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, gate = q_gate.reshape(len(q_gate), num_heads, 2 * head_dim).chunk(2, dim=-1)
    keys = k.reshape(len(k), -1, head_dim)
    return _gemma_norm(q, q_weight, eps), _gemma_norm(keys, k_weight, eps), gate.contiguous()


def _split(
    qkvz: Tensor, ba: Tensor, num_k_heads: int, num_v_heads: int, k_dim: int, v_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = num_v_heads * v_dim
    qkv, z = qkvz.split([2 * num_k_heads * k_dim + values, values], dim=-1)
    b, a = ba.split(num_v_heads, dim=-1)
    return qkv.contiguous(), z.reshape(len(z), num_v_heads, v_dim), b.contiguous(), a.contiguous()


OPERATORS = {
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, "
    "Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
    "bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) -> Tensor": _update,
    "fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)": _gates,
    "fused_rmsnorm_gated_cpu(Tensor x, Tensor weight, Tensor z, float eps) -> Tensor": _norm_gated,
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate) -> ()": _sigmoid_mul,
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps, "
    "int head_dim, int num_heads) -> (Tensor, Tensor, Tensor)": _norm_with_gate,
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor qkvz, Tensor ba, int num_k_heads, int num_v_heads, "
    "int k_dim, int v_dim) -> (Tensor, Tensor, Tensor, Tensor)": _split,
}
"""Of torch.ops.sgl_kernel: schema -> function."""
