"""What one token adds to each divergence, for the GPU's row kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from kdmesh.losses.gpu.form import Op

NOTHING = tl.constexpr(int(Op.NOTHING))
FORWARD_KL = tl.constexpr(int(Op.FORWARD_KL))
REVERSE_KL = tl.constexpr(int(Op.REVERSE_KL))
MASKED_REVERSE_KL = tl.constexpr(int(Op.MASKED_REVERSE_KL))
ENTROPY_GATED_KL = tl.constexpr(int(Op.ENTROPY_GATED_KL))
ADAPTIVE_KL = tl.constexpr(int(Op.ADAPTIVE_KL))
TOP1_CROSS_ENTROPY = tl.constexpr(int(Op.TOP1_CROSS_ENTROPY))
SAMPLED_REVERSE_KL = tl.constexpr(int(Op.SAMPLED_REVERSE_KL))
RENYI = tl.constexpr(int(Op.RENYI))
JENSEN_SHANNON = tl.constexpr(int(Op.JENSEN_SHANNON))
SKEWED_KL = tl.constexpr(int(Op.SKEWED_KL))
SKEWED_REVERSE_KL = tl.constexpr(int(Op.SKEWED_REVERSE_KL))
TOTAL_VARIATION = tl.constexpr(int(Op.TOTAL_VARIATION))

# What stands for the logit of a token that is not there: its probability is 0, and 0 times it is 0.
NEVER = tl.constexpr(-1e30)


@triton.jit
def load_logits(row, columns, num_columns, stride, factor):
    """Logits over the temperature; beyond the vocabulary those that never occur."""
    product = tl.load(row + columns, mask=columns < stride, other=0.0)
    inside = columns < num_columns
    # Padding may hold anything, which must not overflow; the compiler makes one selection of the two.
    return tl.where(inside, tl.where(inside, product, 0.0) * factor, NEVER)


@triton.jit
def terms(log_q, log_p, log_ratio, is_target, gate, first, second, OP: tl.constexpr):
    """Each token's part of the divergence, and h up to a multiple of q, which the caller's h - q sum(h) takes out.

    `log_ratio` is log p - log q from the difference of logits, which keeps its digits near the teacher.
    """
    q, p = tl.exp(log_q), tl.exp(log_p)
    if OP == FORWARD_KL:
        f, h = p * log_ratio, -p
    elif OP >= REVERSE_KL and OP <= MASKED_REVERSE_KL:
        f = -gate * q * log_ratio
        h = f
    elif OP == ENTROPY_GATED_KL:
        f, h = (gate * p - q) * log_ratio, -q * log_ratio - gate * p
    elif OP == ADAPTIVE_KL:
        f, h = ((1.0 - gate) * p - gate * q) * log_ratio, -gate * q * log_ratio - (1.0 - gate) * p
    elif OP >= TOP1_CROSS_ENTROPY and OP <= SAMPLED_REVERSE_KL:
        f, h = q, tl.where(is_target, gate, 0.0)
    elif OP == RENYI:
        f, h = q, -tl.exp(log_q + first * log_ratio - gate)
    elif OP == TOTAL_VARIATION:
        f = 0.5 * tl.abs(q - p)
        h = tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))
    else:
        f, h = _mixture_terms(q, p, log_q, log_p, log_ratio, first, second, OP)
    return f, h


@triton.jit
def _mixture_terms(q, p, log_q, log_p, log_ratio, first, second, OP: tl.constexpr):
    """As terms."""
    if OP == JENSEN_SHANNON:
        log_m, log_p_m = _log_mixture(log_ratio, first)
        h = (first - 1.0) * q * log_m
        f = first * p * log_p_m + h
    elif OP == SKEWED_KL:
        log_m, log_p_m = _log_mixture(log_ratio, first)
        f, h = p * log_p_m, (first - 1.0) * p * tl.exp(-log_m)
    elif OP == SKEWED_REVERSE_KL:
        log_m, _ = _log_mixture(log_ratio, 1.0 - first)
        f, h = -q * log_m, -q * (log_m + first * _expm1(-log_m))
    else:
        f, h = _alpha_beta_terms(log_q, log_p, log_ratio, first, second)
    return f, h


@triton.jit
def _alpha_beta_terms(log_q, log_p, log_ratio, alpha, beta):
    """As terms. Powers of the smaller of the two over the larger: equals give exactly 0, and nothing overflows."""
    s = alpha + beta
    larger = tl.maximum(log_q, log_p)
    under, over = tl.minimum(-log_ratio, 0.0), tl.minimum(log_ratio, 0.0)
    bracket = beta / s * _expm1(s * under) - _expm1(beta * under)
    bracket += alpha / s * _expm1(s * over) - _expm1(alpha * over)
    f = tl.exp(s * larger) * bracket / (alpha * beta)
    smaller = _expm1(alpha * (under + over)) / alpha
    h = tl.exp(alpha * larger + beta * log_q) * tl.where(log_ratio < 0.0, -smaller, smaller)
    return f, h


@triton.jit
def _log_mixture(log_ratio, share):
    """log(m / q) and log(p / m) of m = share p + (1 - share) q; finite whatever underflows.

    The second is not the difference of log(p / q) and the first: where q is next to nothing both are as large.
    """
    smaller = tl.exp(-tl.abs(log_ratio))
    mixed = tl.where(log_ratio > 0.0, share + (1.0 - share) * smaller, (1.0 - share) + share * smaller)
    log_mixed = tl.log(mixed)
    return tl.maximum(log_ratio, 0.0) + log_mixed, tl.minimum(log_ratio, 0.0) - log_mixed


@triton.jit
def _expm1(x):
    """exp(x) - 1 with the digits that the subtraction would lose near 0."""
    series = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)
