"""The fused loss's Triton kernels."""
