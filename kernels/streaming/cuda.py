"""Full and streaming attention on CUDA: which implementation serves which operands."""

import torch
import torch.nn.functional as F

from fluxcompile.kernels.blockwise import irregular_attention
from fluxcompile.kernels.dispatch import hopper_module, triton_module
from fluxcompile.kernels.masks.flags import ALL_VALID, READABLE

#: head dim: queries from which the Hopper kernel outruns cuDNN's causal attention on a GPU that is
#: kept busy, as a model keeps it (`benchmarks/kernels.py`, dense rows). A short prompt is cuDNN's.
OUTRUNS_CUDNN_FROM = {128: 8192}


def may_outrun_cudnn(q: torch.Tensor) -> bool:
    """Whether the Hopper kernel may be the faster one for ``q`` ``[B, H, S, D]``.

    For tracing too: a symbolic length may be long, as asking about it would guard on it.
    """
    queries, head_dim = q.shape[2:]
    if isinstance(head_dim, torch.SymInt) or head_dim not in OUTRUNS_CUDNN_FROM:
        return False
    long = isinstance(queries, torch.SymInt) or queries >= OUTRUNS_CUDNN_FROM[head_dim]
    return long and _in_half_on_hopper(q)


def _in_half_on_hopper(q: torch.Tensor) -> bool:
    half = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(q.device) == (9, 0)


def full_attention(q, k, v, bounds, key_valid, flags, dense_mask, q_start, window, scale, softcap):
    """See :func:`fluxcompile.kernels.ops.full_attention`.

    Torch's fused kernels (cuDNN, FlashAttention) are the fastest where they can serve, but for long
    prompts on Hopper. In fp32 none takes unexpanded KV: torch would fall back to plain matmuls with
    every score in memory.
    """
    all_valid = flags is None or bool(flags[READABLE] & flags[ALL_VALID])
    plain = q_start is None and not window and not softcap and all_valid
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    expands = grouped and q.dtype == torch.float32
    if plain and queries in (1, keys) and not expands and not _outruns_cudnn(q, k, v):
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
    sink, local, window, scale, softcap, last=0,
):  # fmt: skip
    """See :func:`fluxcompile.kernels.ops.streaming_attention`; sink None: every row is dense.

    With ``last``: :func:`fluxcompile.kernels.triangle.op.triangle_attention`.
    """
    pattern = {"sink": sink, "local": local, "last": last, "window": window, "scale": scale}
    irregular = irregular_attention(
        q, k, v, key_valid, flags, dense_mask, q_start, route, softcap=softcap, **pattern
    )
    if irregular is not None:
        return irregular
    # All keys valid: the kernels then need no bounds.
    ranges = None if flags is None or flags[ALL_VALID] else bounds
    hopper = hopper_module("streaming", q, k, v, ranges, flags, softcap)
    if hopper is not None:
        return hopper.attention(q, k, v, ranges, q_start, route, **pattern)
    return triton_module("streaming").attention(
        q, k, v, ranges, q_start, route, softcap=softcap, **pattern
    )


def _outruns_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return may_outrun_cudnn(q) and hopper_module("streaming", q, k, v, None, None, 0.0) is not None
