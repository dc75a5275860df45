"""Full and streaming attention on CUDA: which implementation serves which operands."""

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F

from fluxcompile.kernels.blockwise import irregular_attention
from fluxcompile.kernels.dispatch import triton_module


def full_attention(q, k, v, bounds, key_valid, flags, dense_mask, q_start, window, scale, softcap):
    """See :func:`fluxcompile.kernels.ops.full_attention`.

    Torch's fused kernels (cuDNN, FlashAttention) are the fastest where they can serve. In fp32
    none takes unexpanded KV: torch would fall back to plain matmuls with every score in memory.
    """
    plain = q_start is None and not window and not softcap and (flags is None or flags.all())
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if plain and queries in (1, keys) and not (grouped and q.dtype == torch.float32):
        causal = queries > 1  # torch aligns its causal mask at the upper left: equal lengths only
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous()
    return streaming_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, None,
        None, None, window, scale, softcap,
    )  # fmt: skip


def streaming_attention(
    q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
    sink, local, window, scale, softcap,
):  # fmt: skip
    """See :func:`fluxcompile.kernels.ops.streaming_attention`; sink None: every row is dense."""
    irregular = irregular_attention(
        q, k, v, key_valid, flags, dense_mask, q_start, route,
        sink=sink, local=local, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    if irregular is not None:
        return irregular
    # All keys valid: the kernel then needs no bounds.
    ranges = None if flags is None or flags[2] else bounds
    if ranges is None and q_start is None:
        hopper = _hopper_module()
        if hopper is not None and hopper.serves(q, k, v, softcap):
            return hopper.attention(
                q, k, v, route, sink=sink, local=local, window=window, scale=scale
            )
    return triton_module("streaming").attention(
        q, k, v, ranges, q_start, route,
        sink=sink, local=local, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip


@functools.cache
def _hopper_module() -> ModuleType | None:
    """The warp-specialised kernel, or None where this Triton lacks the Gluon it is built on."""
    triton_module("streaming")  # its absence is an error, not a reason to go without
    try:
        return importlib.import_module("fluxcompile.kernels.streaming.hopper")
    except (ImportError, AttributeError):
        return None
