"""The elementwise half of the fused loss on a GPU: one program takes a row of logits to values and a gradient.

A row is read two or three times and is never in registers as a whole: once for its softmax sums, once for the sums of
the divergence where these do not follow from the first, and once for the gradient. Numbers are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdmesh.losses.gpu.tail import tail_weight
from kdmesh.losses.gpu.terms import (
    ADAPTIVE_KL,
    ENTROPY_GATED_KL,
    MASKED_REVERSE_KL,
    NEVER,
    NOTHING,
    RENYI,
    REVERSE_KL,
    SAMPLED_REVERSE_KL,
    TOP1_CROSS_ENTROPY,
    load_logits,
    terms,
)


@triton.jit
def row_kernel(
    student,  # [C, V] float32, products of hidden states and weight
    teacher,  # [C, V] float32
    gradient,  # [C, V], in place of the student's: d loss / d product
    labels,  # [C] int64
    weights,  # [C] float32
    values,  # [5, C] float32: divergence, cross-entropy, agreement, entropies of student and teacher
    num_columns,
    student_stride,
    teacher_stride,
    gradient_stride,
    student_factor,  # from product to logit / temperature
    teacher_factor,
    temperature,
    kd_factor,  # of the divergence's derivative: kd_weight / temperature
    ce_weight,
    scale,  # from the gradient of logits to that of products
    inverse_cap,
    first,  # the divergence's parameters
    second,
    OP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    WITH_ENTROPIES: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows are allocated up to their stride, so that whole vectors are read and written; what is there is not used."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    s_max, s_sum, s_plain, s_moment, t_max, t_sum, t_moment, cross, best_start = _softmax_sums(
        *(student, teacher, num_columns, student_stride, teacher_stride, student_factor, teacher_factor, temperature),
        *(OP, HAS_LABELS and IS_TEMPERED, WITH_ENTROPIES, BLOCK),
    )
    log_s, log_t, shift = s_max + tl.log(s_sum), 0.0, 0.0
    label, target, value, h_sum, gate = -1, -1, 0.0, 0.0, 1.0
    if HAS_LABELS:
        label = tl.load(labels + row)
    if OP != NOTHING:
        log_t = t_max + tl.log(t_sum)
        shift = log_t - log_s
        best, agrees = _favourite(
            *(student, teacher, best_start, num_columns, student_stride, teacher_stride),
            *(student_factor, teacher_factor, s_max, t_max, BLOCK),
        )
        tl.store(values + 2 * num_rows + row, agrees)
        target, value, h_sum, gate = _known_sums(
            *(student, teacher, student_factor, teacher_factor, label, best, log_s, log_t),
            *(t_max, t_moment / t_sum, cross / s_sum + shift, agrees, first, second, OP),
        )
    if OP == ADAPTIVE_KL:
        gate = tail_weight(
            *(student, teacher, num_columns, student_stride, teacher_stride, student_factor, teacher_factor),
            *(log_s, log_t, t_max, first, BLOCK),
        )
        h_sum = gate * (cross / s_sum + shift) - (1.0 - gate)
    if OP >= RENYI:
        value, h_sum, gate = _sums_of_terms(
            *(student, teacher, num_columns, student_stride, teacher_stride, student_factor, teacher_factor),
            *(log_s, log_t, shift, first, second, OP, BLOCK),
        )
    log_plain = log_s
    if HAS_LABELS:
        at_label = tl.load(student + label) * student_factor
        if IS_TEMPERED:
            log_plain = s_max * temperature + tl.log(s_plain)
            at_label = at_label * temperature
        tl.store(values + num_rows + row, log_plain - at_label)
    if WITH_ENTROPIES:
        tl.store(values + 3 * num_rows + row, log_s - s_moment / s_sum)
        tl.store(values + 4 * num_rows + row, log_t - t_moment / t_sum)
    weight = scale
    if HAS_WEIGHTS:
        weight = scale * tl.load(weights + row)
    total = _last_sweep(
        *(student, teacher, gradient, num_columns, student_stride, teacher_stride, student_factor, teacher_factor),
        *(temperature, log_s, log_t, log_plain, shift, label, target, h_sum, gate, kd_factor, ce_weight),
        *(weight, inverse_cap, first, second),
        *(OP, HAS_LABELS, HAS_CAP, IS_TEMPERED, WITH_GRADIENT, BLOCK),
    )
    if OP != NOTHING:
        tl.store(values + row, total if OP < TOP1_CROSS_ENTROPY else value)


@triton.jit
def _last_sweep(
    student,
    teacher,
    gradient,
    num_columns,
    student_stride,
    teacher_stride,
    student_factor,
    teacher_factor,
    temperature,
    log_s,
    log_t,
    log_plain,
    shift,
    label,
    target,
    h_sum,
    gate,
    kd_factor,
    ce_weight,
    weight,
    inverse_cap,
    first,
    second,
    OP: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient; gives the sum of the divergence's terms."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = load_logits(student, columns, num_columns, student_stride, student_factor)
        q = tl.exp(a - log_s)
        slope = tl.zeros([BLOCK], tl.float32)
        if OP != NOTHING:
            b = load_logits(teacher, columns, num_columns, teacher_stride, teacher_factor)
            f, h = terms(a - log_s, b - log_t, (b - a) - shift, columns == target, gate, first, second, OP)
            total += f
            slope = kd_factor * (h - q * h_sum)
        if HAS_LABELS:
            if IS_TEMPERED:
                q = tl.exp(a * temperature - log_plain)
            slope += ce_weight * (q - tl.where(columns == label, 1.0, 0.0))
        if HAS_CAP:
            tanh = tl.maximum(a * temperature * inverse_cap, -1.0)  # of what is no token as well
            slope *= 1.0 - tanh * tanh
        if WITH_GRADIENT:
            # Narrower elements are written over wider ones, which other warps would have yet to read without this.
            tl.debug_barrier()
            tl.store(gradient + columns, (slope * weight).to(gradient.dtype.element_ty), mask=columns < student_stride)
    return tl.sum(total, axis=0)


@triton.jit
def _softmax_sums(
    student,
    teacher,
    num_columns,
    student_stride,
    teacher_stride,
    student_factor,
    teacher_factor,
    temperature,
    OP: tl.constexpr,
    WITH_PLAIN: tl.constexpr,
    WITH_ENTROPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of both rows: the largest, the sum of exp(logit - largest), also at temperature 1, and that weighted by logits.

    Last come the sum weighted by the two's difference, and where the teacher's largest is to be found.
    """
    s_max = tl.full([], NEVER, tl.float32)
    t_max = tl.full([], NEVER, tl.float32)
    s_sum, s_plain, s_moment = 0.0, 0.0, 0.0
    t_sum, t_moment, cross, best_start = 0.0, 0.0, 0.0, 0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = load_logits(student, columns, num_columns, student_stride, student_factor)
        larger = tl.maximum(s_max, tl.max(a, axis=0))
        powers, kept = tl.exp(a - larger), tl.exp(s_max - larger)
        s_sum = s_sum * kept + tl.sum(powers, axis=0)
        if WITH_PLAIN:
            plain = tl.exp((a - larger) * temperature)
            s_plain = s_plain * tl.exp((s_max - larger) * temperature) + tl.sum(plain, axis=0)
        if WITH_ENTROPIES:
            s_moment = s_moment * kept + tl.sum(powers * a, axis=0)
        s_max = larger
        if OP != NOTHING:
            b = load_logits(teacher, columns, num_columns, teacher_stride, teacher_factor)
            if OP >= REVERSE_KL and OP <= ADAPTIVE_KL:
                cross = cross * kept + tl.sum(powers * (a - b), axis=0)
            larger = tl.maximum(t_max, tl.max(b, axis=0))
            powers, kept = tl.exp(b - larger), tl.exp(t_max - larger)
            t_sum = t_sum * kept + tl.sum(powers, axis=0)
            if WITH_ENTROPIES or OP == ENTROPY_GATED_KL:
                t_moment = t_moment * kept + tl.sum(powers * b, axis=0)
            best_start = tl.where(larger > t_max, start, best_start)
            t_max = larger
    return s_max, s_sum, s_plain, s_moment, t_max, t_sum, t_moment, cross, best_start


@triton.jit
def _favourite(
    student,
    teacher,
    best_start,
    num_columns,
    student_stride,
    teacher_stride,
    student_factor,
    teacher_factor,
    s_max,
    t_max,
    BLOCK: tl.constexpr,
):
    """The teacher's likeliest token, the first of several, and 1 where it is the student's as well."""
    columns = best_start + tl.arange(0, BLOCK)
    b = load_logits(teacher, columns, num_columns, teacher_stride, teacher_factor)
    best = tl.min(tl.where(b >= t_max, columns, num_columns - 1), axis=0)
    a = load_logits(student, columns, num_columns, student_stride, student_factor)
    return best, tl.max(tl.where((columns == best) & (a >= s_max), 1.0, 0.0), axis=0)


@triton.jit
def _known_sums(
    student,
    teacher,
    student_factor,
    teacher_factor,
    label,
    best,
    log_s,
    log_t,
    t_max,
    t_mean,
    reverse,
    agrees,
    first,
    second,
    OP: tl.constexpr,
):
    """What follows from the softmax sums: a token that h needs, the divergence's value, the sum of h, a number for h.

    `reverse` is reverse KL. The values of the divergences up to adaptive KL are left to the last sweep.
    """
    target, value, h_sum, gate = label, 0.0, -1.0, 1.0
    if OP == REVERSE_KL:
        h_sum = reverse
    elif OP == MASKED_REVERSE_KL:
        gate = 1.0 - agrees
        h_sum = gate * reverse
    elif OP == ENTROPY_GATED_KL:
        gate = tl.where(log_t - t_mean > first, second, 0.0)
        h_sum = reverse - gate
    elif OP == TOP1_CROSS_ENTROPY:
        gate = -tl.exp(t_max - log_t)
        value = gate * (tl.load(student + best) * student_factor - log_s)
        target, h_sum = best, gate
    elif OP == SAMPLED_REVERSE_KL:
        log_q = tl.load(student + label) * student_factor - log_s
        value = log_q - (tl.load(teacher + label) * teacher_factor - log_t)
        h_sum, gate = value, value
    return target, value, h_sum, gate


@triton.jit
def _sums_of_terms(
    student,
    teacher,
    num_columns,
    student_stride,
    teacher_stride,
    student_factor,
    teacher_factor,
    log_s,
    log_t,
    shift,
    first,
    second,
    OP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As _known_sums, for the divergences whose sums take another sweep."""
    largest, power_sum = tl.full([], NEVER, tl.float32), 0.0
    values, hs = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = load_logits(student, columns, num_columns, student_stride, student_factor)
        b = load_logits(teacher, columns, num_columns, teacher_stride, teacher_factor)
        if OP == RENYI:
            power = (a - log_s) + first * ((b - a) - shift)
            larger = tl.maximum(largest, tl.max(power, axis=0))
            power_sum = power_sum * tl.exp(largest - larger) + tl.sum(tl.exp(power - larger), axis=0)
            largest = larger
        else:
            f, h = terms(a - log_s, b - log_t, (b - a) - shift, columns < 0, 1.0, first, second, OP)
            values += f
            hs += h
    if OP == RENYI:
        gate = largest + tl.log(power_sum)
        value, h_sum = gate / (first - 1.0), -1.0
    else:
        value, h_sum, gate = tl.sum(values, axis=0), tl.sum(hs, axis=0), 1.0
    return value, h_sum, gate
