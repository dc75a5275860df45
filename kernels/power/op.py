"""``flux::power_attention``: blocks at power-of-two distances, the sink and a local band.

The pattern is that of PowerAttention (arXiv 2503.03588): the keys that a token's information can
come from grow exponentially with depth, while a query block attends to a logarithmic number of
blocks. On the block grid of :mod:`fluxcompile.kernels.block_sparse`, with ``d`` the number
of KV blocks from ``j`` to the one a query sits in, its query block attends to KV block ``j`` if

* ``d`` is 0 or a power of two (1, 2, 4, 8, ...), or
* ``d <= ceil((local - 1) / block)``: the band that holds each query's ``local`` latest keys, or
* ``j < ceil(sink / block)``: the blocks that hold the row's first ``sink`` keys.

A query block that sits across two KV blocks, ragged or not, attends to what either asks for. A
sparse row thus sees all that streaming attention with the same ``sink`` and ``local`` sees, and is
exactly dense up to ``sink + local`` keys.
"""

import torch
from torch import Tensor

from fluxcompile.kernels.block_sparse.grid import query_offset
from fluxcompile.kernels.block_sparse.op import attend_over
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.validation import check_at_least, check_block, check_routed


def power_attention(
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
    block: int,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention whose sparse rows see blocks at power-of-two distances, sink and local.

    Operands as in :mod:`fluxcompile.kernels.ops`; a batch with a row with holes, or with a mask
    that is not readable, attends densely.

    Args:
        sink: valid tokens at the row's beginning that every query sees.
        local: valid tokens up to and including itself that every query sees.
        block: tokens a block: 16, 32, 64 or 128.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.power_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
        sink, local, block, window, scale, softcap,
    )  # fmt: skip


def block_mask(
    offset: Tensor, queries: int, keys: int, *, sink: int, local: int, block: int
) -> Tensor:
    """The pattern as bool ``[B, 1, ceil(queries / block), ceil(keys / block)]``.

    Args:
        offset: integer ``[B]``, keys from KV block 0 to query block 0.
    """
    query = torch.arange(-(-queries // block), device=offset.device) * block
    first = (offset[:, None] + query)[:, None, :, None]  # row-relative, of each query block
    j = torch.arange(-(-keys // block), device=offset.device)
    chosen = j < -(-sink // block)
    for own in (first // block, (first + block - 1) // block):
        d = own - j
        near = d <= -(-(local - 1) // block)
        chosen = chosen | ((d >= 0) & (near | (d & (d - 1) == 0)))
    return chosen


def _check(*operands):
    *common, sink, local, block, window, scale, softcap = operands
    check_routed(*common, window, scale, softcap)
    check_at_least("sink", sink, 0)
    check_at_least("local", local, 1)
    check_block(block)


def _attend(q, k, v, *operands):
    *mask_and_route, sink, local, block, window, scale, softcap = operands
    queries, keys, q_start = q.shape[2], k.shape[2], mask_and_route[4]

    def choose(bounds):
        offset = query_offset(bounds, q_start, queries, keys, q.device)
        return block_mask(offset, queries, keys, sink=sink, local=local, block=block)

    return attend_over(
        choose, q, k, v, *mask_and_route, block=block, window=window, scale=scale, softcap=softcap
    )


register(
    "power_attention",
    f"(Tensor q, Tensor k, Tensor v, {KEY_MASK}, Tensor? route, "
    "int sink, int local, int block, int window, float scale, float softcap) -> Tensor",
    check=_check,
    cpu=_attend,
    cuda=_attend,
    fake=attention_fake,
)
