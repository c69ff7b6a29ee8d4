"""oneDNN's matrix kernel for CPUs, which torch contains and has no operator for.

No CPU operator multiplies bfloat16 matrices into float32, and the one for float32 leaves the widest instructions of
processors other than Intel's unused. This kernel does both, on the thread that calls it. It is a function of libtorch,
declared in its ATen/native/CPUBlas.h. A C++ name spells out the types of the arguments: a torch whose function has
other ones lacks the name, and then `takes` says no.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

# (M, N, K, row strides of left, right, out, adds, left, right, out, is right in pairs)
_Kernel: TypeAlias = Callable[[int, int, int, int, int, int, bool, int, int, int, bool], None]
_ARGUMENTS = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
_NAMES = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_LONGEST_PIECE = 512


def takes(matrix: Tensor) -> bool:
    """Whether this torch on this processor multiplies such a matrix here."""
    if matrix.device.type != "cpu" or matrix.dtype not in _NAMES or _kernel(matrix.dtype) is None:
        return False
    are_pairs = all(length % 2 == 0 for length in (matrix.stride(0), matrix.shape[1], matrix.storage_offset()))
    return matrix.stride(1) == 1 and (are_pairs or matrix.dtype is torch.float32)


def multiply_into(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Overwrite `out_MN`, float32, with left @ right; Python's lock is free meanwhile.

    For matrices that `takes` likes; a bfloat16 `right_KN` comes from `transposed`.
    """
    kernel, release, is_in_pairs = _kernel(left_MK.dtype), _release(), left_MK.dtype is torch.bfloat16
    assert kernel is not None and release is not None
    (num_rows, depth), num_columns, size = left_MK.shape, out_MN.shape[1], left_MK.itemsize
    left_stride, out_stride = left_MK.stride(0), out_MN.stride(0)
    right_stride = num_columns if is_in_pairs else right_KN.stride(0)
    left, right, out = left_MK.data_ptr(), right_KN.data_ptr(), out_MN.data_ptr()
    for inner, inner_size in _pieces(depth):
        for row, row_size in _pieces(num_rows):
            kernel(
                *(row_size, num_columns, inner_size),
                *(left_stride, right_stride, out_stride),
                inner > 0,
                left + (row * left_stride + inner) * size,
                right + inner * right_stride * size,
                out + row * out_stride * out_MN.itemsize,
                is_in_pairs,
            )
    release(is_in_pairs)


def transposed(matrix_NK: Tensor) -> Tensor:
    """The transpose, as a right side of `multiply_into`."""
    if matrix_NK.dtype is not torch.bfloat16:
        return matrix_NK.T.contiguous()
    # [K / 2, N, 2]: what two rows hold in one column lies side by side, which is how the instructions take it.
    pairs_KN2 = matrix_NK.view(torch.int32).T.contiguous()
    return pairs_KN2.view(torch.bfloat16)


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """Start and size of parts that cover `length`, from few sizes: for every shape it meets, the kernel is compiled."""
    start, size = 0, _LONGEST_PIECE
    while start < length:
        while size > length - start:
            size //= 2
        yield start, size
        start += size


@lru_cache
def _kernel(dtype: torch.dtype) -> _Kernel | None:
    # Where the processor cannot, the function throws, and nothing would catch that: so ask before.
    has_instructions = "AVX512" in torch.backends.cpu.get_cpu_capability() and (
        dtype is torch.float32 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    is_limited = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    kernel = getattr(_library(), _NAMES[dtype], None)
    if kernel is None or _release() is None or not has_instructions or is_limited or not torch.backends.mkldnn.enabled:
        return None
    kernel.argtypes, kernel.restype = _ARGUMENTS, None
    found: _Kernel = kernel
    return found


@lru_cache
def _release() -> Callable[[bool], None] | None:
    """Gives the calling thread its registers back, of which AMX is given a configuration."""
    release: Any = getattr(_library(), _RELEASE, None)
    if release is not None:
        release.argtypes, release.restype = [ctypes.c_bool], None
    found: Callable[[bool], None] | None = release
    return found


@lru_cache
def _library() -> ctypes.CDLL | None:
    path = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    return ctypes.CDLL(str(path)) if path.exists() else None
