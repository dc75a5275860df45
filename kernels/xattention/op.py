"""``flux::xattention_attention``: schema, check and dispatch."""

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.block_sparse.op import attend_over
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.validation import check_block, check_routed
from fluxcompile.kernels.xattention import cpu


def xattention_attention(
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
    stride: int,
    threshold: float,
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention whose sparse rows see the blocks that antidiagonal scores choose.

    The choice is defined in :mod:`fluxcompile.kernels.xattention`; operands as in
    :mod:`fluxcompile.kernels.ops`. A batch with a row with holes, or with a mask that is not
    readable, attends densely.

    Args:
        stride: tokens that one score sums over; divides ``block``.
        threshold: share of a query block's estimated mass to reach, in (0, 1].
        block: tokens a block: 16, 32, 64 or 128.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.xattention_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
        stride, threshold, block, window, scale, softcap,
    )  # fmt: skip


def _check(*operands):
    *common, stride, threshold, block, window, scale, softcap = operands
    check_routed(*common, window, scale, softcap)
    check_block(block)
    if stride < 1 or block % stride:
        raise KernelError.mismatch("stride", f"a divisor of block ({block})", stride)
    if not 0 < threshold <= 1:
        raise KernelError.mismatch("threshold", "in (0, 1]", threshold)


def choose_blocks(
    q: Tensor,
    k: Tensor,
    bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    route: Tensor | None = None,
    *,
    stride: int,
    threshold: float,
    block: int,
    window: int = 0,
    scale: float,
) -> Tensor:
    """XAttention's choice alone: bool ``[B, H, ceil(Sq / block), ceil(Skv / block)]``."""
    block_mask = triton_module("xattention").block_mask if q.is_cuda else cpu.block_mask
    return block_mask(
        q, k, bounds, q_start, route,
        stride=stride, threshold=threshold, block=block, window=window, scale=scale,
    )  # fmt: skip


def _attend(q, k, v, *operands):
    *mask_and_route, stride, threshold, block, window, scale, softcap = operands
    q_start, route = mask_and_route[4:]
    choice = {"stride": stride, "threshold": threshold, "block": block, "window": window}
    return attend_over(
        lambda bounds: choose_blocks(q, k, bounds, q_start, route, scale=scale, **choice),
        q, k, v, *mask_and_route, block=block, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip


register(
    "xattention_attention",
    f"(Tensor q, Tensor k, Tensor v, {KEY_MASK}, Tensor? route, int stride, float threshold, "
    "int block, int window, float scale, float softcap) -> Tensor",
    check=_check,
    cpu=_attend,
    cuda=_attend,
    fake=attention_fake,
)
