"""``flux::block_sparse_attention``, and what every pattern of blocks is built on."""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxcompile.kernels.block_sparse import cpu
from fluxcompile.kernels.blockwise import irregular_attention
from fluxcompile.kernels.dispatch import hopper_module, triton_module
from fluxcompile.kernels.masks.flags import ALL_VALID
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.validation import check_block, check_routed, check_tensor


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    bounds: Tensor | None = None,
    key_valid: Tensor | None = None,
    flags: Tensor | None = None,
    dense_mask: Tensor | None = None,
    q_start: Tensor | None = None,
    route: Tensor | None = None,
    *,
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention whose sparse rows see only the chosen blocks of keys.

    Blocks are counted from the row's first valid key, see :mod:`fluxcompile.kernels.block_sparse`;
    operands as in :mod:`fluxcompile.kernels.ops`. A batch with a row with holes, or with a mask
    that is not readable, attends densely.

    Args:
        block_mask: bool ``[B|1, H|1, ceil(Sq / block), ceil(Skv / block)]``, True where a query
            block attends to a KV block.
        block: tokens a block: 16, 32, 64 or 128.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.block_sparse_attention(
        q, k, v, block_mask, bounds, key_valid, flags, dense_mask, q_start, route,
        block, window, scale, softcap,
    )  # fmt: skip


def attend_over(
    choose: Callable[[Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    block: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend over the blocks that ``choose(bounds)`` gives, on the device of ``q``.

    Dense, and nothing chosen, where no block grid can be laid over the key mask. ``choose`` gets
    bounds only where some key is not valid.
    """
    dense = irregular_attention(
        q, k, v, key_valid, flags, dense_mask, q_start, None,
        sink=None, local=None, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    if dense is not None:
        return dense
    bounds = None if flags is None or flags[ALL_VALID] else bounds
    operands = q, k, v, choose(bounds), bounds, q_start, route
    if q.is_cuda:
        hopper = hopper_module("block_sparse", q, k, v, bounds, flags, softcap)
        if hopper is not None and block == hopper.BLOCK:
            return hopper.attention(*operands, window=window, scale=scale)
    attention = triton_module("block_sparse").attention if q.is_cuda else cpu.attention
    return attention(*operands, block=block, window=window, scale=scale, softcap=softcap)


def _check(q, k, v, block_mask, *operands):
    *mask_and_route, block, window, scale, softcap = operands
    check_routed(q, k, v, *mask_and_route, window, scale, softcap)
    check_block(block)
    batch, heads, queries, _ = q.shape
    rows, columns = block_mask.shape[:2] if block_mask.dim() == 4 else (batch, heads)
    shape = (
        1 if isinstance(rows, int) and rows == 1 else batch,
        1 if isinstance(columns, int) and columns == 1 else heads,
        -(-queries // block),
        -(-k.shape[2] // block),
    )
    check_tensor("block_mask", block_mask, torch.bool, shape, device=q.device)


def _attend(q, k, v, block_mask, *operands):
    *mask_and_route, block, window, scale, softcap = operands
    return attend_over(
        lambda bounds: block_mask, q, k, v, *mask_and_route,
        block=block, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip


register(
    "block_sparse_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor block_mask, {KEY_MASK}, Tensor? route, "
    "int block, int window, float scale, float softcap) -> Tensor",
    check=_check,
    cpu=_attend,
    cuda=_attend,
    fake=attention_fake,
)
