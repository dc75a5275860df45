"""Block-sparse attention of a prompt in Triton.

``list_kernel`` turns each row of the block mask into a list of KV blocks, on the device: *full*
blocks, which every query of the block sees whole, from the list's beginning, and *partial* blocks,
which touch the diagonal, the window's edge or the end of the valid keys, from its end. One program
of ``attention_kernel`` then serves one query block, or a part of it, of one head: it walks the full
blocks without any mask, then the partial ones. A dense row's list holds every block, so one launch
serves mixed batches.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block, ``n_`` count; ``M``
queries, ``N`` keys, ``D`` head dim, ``J`` KV blocks. Scores live in base 2.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcompile.kernels.launch import power_of_two, row_strides, score_scales, tile, unit_stride

# Below every score and finite, so that the running maximum of a query without keys stays finite.
_FLOOR = tl.constexpr(-1.0e30)
_SHORT = 1 << 15  # KV blocks that 16-bit list entries can number


@dataclass(frozen=True)
class Config:
    """Tile sizes in tokens, no more than a block, and launch parameters."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def within(self, block: int) -> "Config":
        """The same for blocks of ``block`` tokens, with the warps that smaller tiles need."""
        block_m = min(self.block_m, block)
        warps = max(4, self.num_warps * block_m // self.block_m)
        return replace(self, block_m=block_m, block_n=min(self.block_n, block), num_warps=warps)


# (head dim rounded up, bytes an element) -> launch, for blocks of 128. For Hopper-class GPUs.
CONFIGS = {
    (16, 2): Config(128, 128, 4, 3),
    (32, 2): Config(128, 128, 4, 3),
    (64, 2): Config(128, 128, 8, 3),
    (128, 2): Config(128, 64, 8, 3),
    (256, 2): Config(128, 32, 8, 3),
    (16, 4): Config(64, 32, 4, 2),
    (32, 4): Config(64, 32, 4, 2),
    (64, 4): Config(64, 32, 8, 2),
    (128, 4): Config(32, 64, 8, 2),
    (256, 4): Config(32, 16, 8, 2),
}


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mh", "stride_mq",
        "n_query_blocks", "n_key_blocks", "n_queries", "n_keys", "window",
    ]
)  # fmt: skip
def list_kernel(
    p_mask, p_list, p_count, p_bounds, p_q_start, p_route,
    stride_mb, stride_mh, stride_mq,
    n_query_blocks, n_key_blocks, n_queries, n_keys, window,
    MASK_HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr, HAS_ROUTE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """List the chosen KV blocks of one query block: ``p_list`` ``[B, MASK_HEADS, Qb, KVb]``."""
    i_list = tl.program_id(0).to(tl.int64)
    i_block = i_list % n_query_blocks
    i_head = (i_list // n_query_blocks) % MASK_HEADS
    i_batch = i_list // n_query_blocks // MASK_HEADS

    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)

    low = tl.maximum(first, start) + i_block * BLOCK  # positions of the block's first, last query
    high = tl.minimum(low + BLOCK, first + n_queries) - 1
    o_block = tl.arange(0, BLOCK_J)
    o_key = start + o_block * BLOCK
    seen_end = tl.where(low <= high, tl.minimum(end, high + 1), start)  # no query: no key
    m_seen = (o_block < n_key_blocks) & (o_key < seen_end)
    m_full = o_key + BLOCK <= tl.minimum(end, low + 1)
    if HAS_WINDOW:
        m_seen &= o_key + BLOCK > low - window + 1
        m_full &= o_key > high - window
    p_mask += i_batch * stride_mb + i_head * stride_mh + i_block * stride_mq
    b_mask = tl.load(p_mask + o_block, mask=m_seen, other=0)
    if HAS_ROUTE:
        b_mask |= tl.load(p_route + i_batch)
    m_chosen = m_seen & (b_mask != 0)
    m_partial = m_chosen & ~m_full
    m_full &= m_chosen
    b_full = m_full.to(tl.int32)
    b_partial = m_partial.to(tl.int32)

    p_list += i_list * n_key_blocks
    b_entry = o_block.to(p_list.dtype.element_ty)
    tl.store(p_list + tl.cumsum(b_full, 0) - 1, b_entry, mask=m_full)
    tl.store(p_list + n_key_blocks - tl.cumsum(b_partial, 0), b_entry, mask=m_partial)
    tl.store(p_count + i_list * 2, tl.sum(b_full, 0))
    tl.store(p_count + i_list * 2 + 1, tl.sum(b_partial, 0))
    if i_list == 0:  # behind the counts: how many tiles have been taken, see flow.py
        tl.store(p_count + tl.num_programs(0).to(tl.int64) * 2, 0)


@triton.jit
def _attend_keys(
    b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs, i_key, key_end,
    o_position, window, score_scale, cap_scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over keys ``[i_key, i_key + N)``; below ``key_end`` if MASKED."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_k_block = p_k + i_key.to(tl.int64) * stride_ks + o_n[:, None] * stride_ks + o_d[None, :]
    p_v_block = p_v + i_key.to(tl.int64) * stride_vs + o_n[:, None] * stride_vs + o_d[None, :]
    o_key = i_key + o_n
    # [N, D] each; what lies outside is never read, whatever it holds
    if MASKED:
        m_kv = (o_key < key_end)[:, None] & (o_d < HEAD_DIM)[None, :]
        b_k = tl.load(p_k_block, mask=m_kv, other=0.0)
        b_v = tl.load(p_v_block, mask=m_kv, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        m_d = (o_d < HEAD_DIM)[None, :]
        b_k = tl.load(p_k_block, mask=m_d, other=0.0)
        b_v = tl.load(p_v_block, mask=m_d, other=0.0)
    else:
        b_k = tl.load(p_k_block)
        b_v = tl.load(p_v_block)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [M, N]
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both infinities
        b_scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_scores * cap_scale))
    if MASKED:
        m_seen = (o_key[None, :] <= o_position[:, None]) & (o_key < key_end)[None, :]
        if HAS_WINDOW:
            m_seen &= o_key[None, :] > o_position[:, None] - window
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
    b_max_new = tl.maximum(b_max, tl.max(b_scores, 1) * score_scale)
    b_weights = tl.exp2(b_scores * score_scale - b_max_new[:, None])
    b_decay = tl.exp2(b_max - b_max_new)
    b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
    b_out = b_out * b_decay[:, None]
    b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    return b_out, b_max_new, b_sum


@triton.jit(do_not_specialize=["n_query_blocks", "n_key_blocks", "n_queries", "n_keys", "window"])
def attention_kernel(
    p_q, p_k, p_v, p_out, p_list, p_count, p_bounds, p_q_start,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    n_query_blocks, n_key_blocks, n_queries, n_keys, window,
    score_scale, cap_scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend from M queries of one query block of one head over the block's list."""
    # One KV head after another, so that its chosen blocks are still cached for the next queries;
    # late blocks, the longest, before early.
    i_program = tl.program_id(0)
    i_rest = i_program // GROUP
    n_parts = n_query_blocks * (BLOCK // BLOCK_M)
    i_part = n_parts - 1 - i_rest % n_parts
    i_block = i_part // (BLOCK // BLOCK_M)
    i_kv_head = (i_rest // n_parts) % (HEADS // GROUP)
    i_head = i_kv_head * GROUP + i_program % GROUP
    i_batch = (i_rest // n_parts // (HEADS // GROUP)).to(tl.int64)

    start = 0
    end = n_keys
    if HAS_BOUNDS:
        start = tl.load(p_bounds + i_batch * 2)
        end = tl.load(p_bounds + i_batch * 2 + 1)
    first = n_keys - n_queries
    if HAS_Q_START:
        first = tl.load(p_q_start)
    i_query = tl.maximum(start - first, 0) + i_part * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_position = first + i_query + o_m
    key_end = tl.minimum(end, first + tl.minimum(i_query + BLOCK_M, n_queries))

    i_list = (i_batch * MASK_HEADS + i_head % MASK_HEADS) * n_query_blocks + i_block
    n_full = tl.load(p_count + i_list * 2)
    n_partial = tl.load(p_count + i_list * 2 + 1)
    p_list += i_list * n_key_blocks

    p_k += i_batch * stride_kb + i_kv_head.to(tl.int64) * stride_kh
    p_v += i_batch * stride_vb + i_kv_head.to(tl.int64) * stride_vh
    p_q += i_batch * stride_qb + i_head.to(tl.int64) * stride_qh + i_query.to(tl.int64) * stride_qs
    m_q = (i_query + o_m < n_queries)[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_q + o_m[:, None] * stride_qs + o_d[None, :], mask=m_q, other=0.0)  # [M, D]

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _FLOOR, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    for i in range(n_full * PARTS):
        i_key = start + tl.load(p_list + i // PARTS).to(tl.int32) * BLOCK + i % PARTS * BLOCK_N
        b_out, b_max, b_sum = _attend_keys(
            b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs, i_key, key_end,
            o_position, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    for i in range(n_partial * PARTS):
        i_entry = n_key_blocks - 1 - i // PARTS
        i_key = start + tl.load(p_list + i_entry).to(tl.int32) * BLOCK + i % PARTS * BLOCK_N
        b_out, b_max, b_sum = _attend_keys(
            b_out, b_max, b_sum, b_q, p_k, p_v, stride_ks, stride_vs, i_key, key_end,
            o_position, window, score_scale, cap_scale, softcap,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip

    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_out += ((i_batch * n_queries + i_query) * HEADS + i_head) * HEAD_DIM
    p_out_block = p_out + o_m[:, None] * (HEADS * HEAD_DIM) + o_d[None, :]
    tl.store(p_out_block, b_out.to(p_out.dtype.element_ty), mask=m_q)


def block_lists(
    q: Tensor,
    k: Tensor,
    block_mask: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    block: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`list_kernel`; operands as of :func:`attention`.

    Returns:
        KV blocks, int16 or int32 ``[B, H|1, Qb, KVb]``: full ones from the beginning, partial ones
        from the end; and how many of each there are, int32 ``[B, H|1, Qb, 2]``, with a 0 behind.
    """
    block_mask = unit_stride(block_mask).expand(q.shape[0], -1, -1, -1).view(torch.uint8)
    key_blocks = block_mask.shape[3]
    entry = torch.int16 if key_blocks < _SHORT else torch.int32
    lists = q.new_empty(block_mask.shape, dtype=entry)
    rows = block_mask.shape[:3]
    counts = q.new_empty(2 * rows.numel() + 1, dtype=torch.int32)[:-1].view(*rows, 2)
    with torch.cuda.device_of(q):
        list_kernel[(counts.numel() // 2,)](
            block_mask, lists, counts,
            q if bounds is None else bounds.contiguous(),
            q if q_start is None else q_start,
            q if route is None else route.contiguous().view(torch.uint8),
            *row_strides(block_mask),
            block_mask.shape[2], key_blocks, q.shape[2], k.shape[2], window,
            MASK_HEADS=block_mask.shape[1], BLOCK=block,
            BLOCK_J=power_of_two(key_blocks),
            HAS_BOUNDS=bounds is not None, HAS_Q_START=q_start is not None,
            HAS_ROUTE=route is not None, HAS_WINDOW=window > 0,
        )  # fmt: skip
    return lists, counts


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    block: int,
    window: int,
    scale: float,
    softcap: float,
    config: Config | None = None,
) -> Tensor:
    """Launch both kernels without reading device data.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        block_mask: bool ``[B|1, H|1, ceil(Sq / block), ceil(Skv / block)]``.
        bounds: None: every key is valid.
        config: tile sizes; None: the ones of :data:`CONFIGS`.

    Returns:
        ``[B, Sq, H, D]``.
    """
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, queries, head_dim = q.shape
    mask_heads, query_blocks, key_blocks = block_mask.shape[1:]
    block_d = tile(head_dim)
    config = (config or CONFIGS[block_d, q.element_size()]).within(block)
    # Queries before a row's first valid key belong to no block.
    make = q.new_empty if bounds is None else q.new_zeros
    out = make(batch, queries, heads, head_dim)
    if not out.numel():
        return out
    lists, counts = block_lists(
        q, k, block_mask, bounds, q_start, route, block=block, window=window
    )
    parts = query_blocks * (block // config.block_m)
    with torch.cuda.device_of(q):
        attention_kernel[(heads * batch * parts,)](
            q, k, v, out, lists, counts,
            q if bounds is None else bounds.contiguous(),
            q if q_start is None else q_start,
            *row_strides(q), *row_strides(k), *row_strides(v),
            query_blocks, key_blocks, queries, k.shape[2], window,
            *score_scales(scale, softcap), float(softcap),
            HEADS=heads, GROUP=heads // k.shape[1], MASK_HEADS=mask_heads,
            HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK=block, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_BOUNDS=bounds is not None, HAS_Q_START=q_start is not None,
            HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
