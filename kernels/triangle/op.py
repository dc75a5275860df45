"""``flux::triangle_attention``: schema, check and dispatch."""

import torch
from torch import Tensor

from fluxcompile.kernels.blockwise import irregular_attention
from fluxcompile.kernels.masks.flags import ALL_VALID
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.streaming import cuda
from fluxcompile.kernels.triangle import cpu
from fluxcompile.kernels.validation import check_at_least, check_streaming


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None = None,
    key_valid: Tensor | None = None,
    flags: Tensor | None = None,
    dense_mask: Tensor | None = None,
    q_start: Tensor | None = None,
    route: Tensor | None = None,
    *,
    sink: int,
    local: int,
    last: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """:func:`fluxcompile.kernels.ops.streaming_attention`, dense for each row's last queries.

    Args:
        sink: valid keys kept at the row's beginning, in tokens.
        local: valid keys kept up to and including the query, in tokens.
        last: valid queries at the end of each sparse row that see every earlier key.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.triangle_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
        sink, local, last, window, scale, softcap,
    )  # fmt: skip


def _check(*operands):
    *streaming, last, window, scale, softcap = operands
    check_streaming(*streaming, window, scale, softcap)
    check_at_least("last", last, 0)


def _attend_on_cpu(
    q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
    sink, local, last, window, scale, softcap,
):  # fmt: skip
    irregular = irregular_attention(
        q, k, v, key_valid, flags, dense_mask, q_start, route,
        sink=sink, local=local, last=last, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    if irregular is not None:
        return irregular
    ranges = None if flags is None or flags[ALL_VALID] else bounds
    return cpu.attention(q, k, v, ranges, q_start, route, sink, local, last, window, scale, softcap)


def _attend_on_cuda(*operands):
    *streaming, last, window, scale, softcap = operands
    return cuda.streaming_attention(*streaming, window, scale, softcap, last)


register(
    "triangle_attention",
    f"(Tensor q, Tensor k, Tensor v, {KEY_MASK}, Tensor? route, "
    "int sink, int local, int last, int window, float scale, float softcap) -> Tensor",
    check=_check,
    cpu=_attend_on_cpu,
    cuda=_attend_on_cuda,
    fake=attention_fake,
)
