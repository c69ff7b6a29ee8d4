"""The teacher's least likely tokens in a row of logits, without sorting it, for the GPU's row kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from kdmesh.losses.gpu.terms import load_logits

_LEAST = tl.constexpr(-100.0)  # of a logit below the row's largest that a float32 sum of probabilities notices
_MOST_TURNS = tl.constexpr(40)  # a quarter of the interval each: more than float32 has digits


@triton.jit
def tail_weight(
    student,
    teacher,
    num_columns,
    student_stride,
    teacher_stride,
    student_factor,
    teacher_factor,
    log_s,
    log_t,
    t_max,
    mass,
    BLOCK: tl.constexpr,
):
    """How much of the sum of |p - q| lies in the teacher's tail of `mass`, as adaptive_kl says; 0.5 where p = q."""
    edge = _tail_edge(teacher, num_columns, teacher_stride, teacher_factor, log_t, t_max, mass, BLOCK)
    gaps, tail_gaps = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = load_logits(student, columns, num_columns, student_stride, student_factor)
        b = load_logits(teacher, columns, num_columns, teacher_stride, teacher_factor)
        gap = tl.abs(tl.exp(a - log_s) - tl.exp(b - log_t))
        gaps += gap
        tail_gaps += tl.where(b <= edge, gap, 0.0)
    gap = tl.sum(gaps, axis=0)
    return tl.where(gap > 0.0, tl.sum(tail_gaps, axis=0) / gap, 0.5)


@triton.jit
def _tail_edge(teacher, num_columns, stride, factor, log_t, t_max, mass, BLOCK: tl.constexpr):
    """The tail are the logits up to this one.

    The last logit of the tail is sought between two bounds, of which the lower is in the tail and the upper is not.
    Each sweep takes the masses up to three points between them, and the least and the greatest logit above the lower
    bound and up to the upper one: once these are the same, the tail ends below it.
    """
    inside, outside = t_max + _LEAST, t_max
    least, greatest, turns = inside, outside, 0
    while (least < greatest) & (turns < _MOST_TURNS):
        quarter = 0.25 * (outside - inside)
        one, two, three = inside + quarter, inside + 2.0 * quarter, outside - quarter
        up_to_one, up_to_two, up_to_three = 0.0, 0.0, 0.0
        least, greatest = t_max, inside
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            b = load_logits(teacher, columns, num_columns, stride, factor)
            p = tl.exp(b - log_t)
            up_to_one += tl.sum(tl.where(b <= one, p, 0.0), axis=0)
            up_to_two += tl.sum(tl.where(b <= two, p, 0.0), axis=0)
            up_to_three += tl.sum(tl.where(b <= three, p, 0.0), axis=0)
            is_between = (b > inside) & (b <= outside)
            least = tl.minimum(least, tl.min(tl.where(is_between, b, outside), axis=0))
            greatest = tl.maximum(greatest, tl.max(tl.where(is_between, b, inside), axis=0))
        inside = tl.where(up_to_one <= mass, one, inside)
        inside = tl.where(up_to_two <= mass, two, inside)
        inside = tl.where(up_to_three <= mass, three, inside)
        outside = tl.where(up_to_three > mass, three, outside)
        outside = tl.where(up_to_two > mass, two, outside)
        outside = tl.where(up_to_one > mass, one, outside)
        turns += 1
    return inside
