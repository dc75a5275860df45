"""Block-sparse attention of short rows on Hopper: many tiles of few blocks each.

What every group of warps of ``flow.py`` must know of the tiles and of their blocks, and the launch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from fluxcompile.kernels.block_sparse.flow import FIRST, LAST, MASKED, serve
from fluxcompile.kernels.block_sparse.long import mask_partial
from fluxcompile.kernels.launch import ceil_div
from fluxcompile.kernels.streaming.hopper_tiles import Keys, Row

STAGES = 2  # blocks, and tiles of queries, in shared memory at once
# Tiles a program that are kept for the end, of the shortest: programs then end together.
_TAIL = 2


@aggregate
class Tile:
    """One query block of one head. Its list begins at entry ``i_list``; partial blocks first.

    A tile of queries has one block at least: if its list is empty, one of which no key is seen. A
    tile beyond the queries of its row has none.
    """

    i_head: gl.tensor
    i_kv_head: gl.tensor
    i_batch: gl.tensor
    i_query: gl.tensor
    low: gl.tensor
    row: Row
    key_end: gl.tensor
    i_list: gl.tensor
    i_first: gl.tensor
    n_masked: gl.tensor
    n_blocks: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self, i_head, i_kv_head, i_batch, i_query, low, row, key_end, i_list, i_first, n_masked,
        n_blocks,
    ):  # fmt: skip
        self.i_head = i_head
        self.i_kv_head = i_kv_head
        self.i_batch = i_batch
        self.i_query = i_query
        self.low = low
        self.row = row
        self.key_end = key_end
        self.i_list = i_list
        self.i_first = i_first
        self.n_masked = n_masked
        self.n_blocks = n_blocks


@aggregate
class Problem:
    """What every group of warps must know: the rows' keys, the lists, and what the mask uses."""

    keys: Keys
    p_list: gl.tensor
    p_count: gl.tensor
    n_batch: gl.tensor
    n_query_blocks: gl.tensor
    n_key_blocks: gl.tensor
    n_tail: gl.tensor
    window: gl.tensor
    score_scale: gl.tensor
    HEADS: gl.constexpr
    GROUP: gl.constexpr
    MASK_HEADS: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    STAGES: gl.constexpr
    HAS_WINDOW: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, keys, p_list, p_count, n_batch, n_query_blocks, n_key_blocks, n_tail, window,
        score_scale, HEADS, GROUP, MASK_HEADS, BLOCK, BLOCK_D, STAGES, HAS_WINDOW,
    ):  # fmt: skip
        self.keys = keys
        self.p_list = p_list
        self.p_count = p_count
        self.n_batch = n_batch
        self.n_query_blocks = n_query_blocks
        self.n_key_blocks = n_key_blocks
        self.n_tail = n_tail
        self.window = window
        self.score_scale = score_scale
        self.HEADS = gl.constexpr(HEADS)
        self.GROUP = gl.constexpr(GROUP)
        self.MASK_HEADS = gl.constexpr(MASK_HEADS)
        self.BLOCK_M = gl.constexpr(BLOCK)
        self.BLOCK_N = gl.constexpr(BLOCK)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.STAGES = gl.constexpr(STAGES)
        self.HAS_WINDOW = gl.constexpr(HAS_WINDOW)

    @gluon.jit
    def tiles(self):
        """Tiles of the whole launch."""
        return self.n_query_blocks * self.n_batch * self.HEADS

    @gluon.jit
    def tile(self, i_tile):
        """Where a tile's queries lie, and its list. Query blocks begin at the first valid key."""
        # One KV head after another, late query blocks, the longest, before early: its chosen blocks
        # are still cached for the next queries. But the first ``n_tail`` query blocks of all heads
        # come last: with short tiles the programs end together.
        KV_HEADS: gl.constexpr = self.HEADS // self.GROUP
        n_rows = self.n_batch * KV_HEADS
        n_body = self.n_query_blocks - self.n_tail
        i_part = i_tile // self.GROUP
        i_tail = i_part - n_rows * n_body
        in_tail = i_tail >= 0
        i_part = gl.where(in_tail, i_tail, i_part)
        n_part = gl.where(in_tail, n_rows, n_body)
        i_major = i_part // n_part
        i_minor = i_part - i_major * n_part
        i_row = gl.where(in_tail, i_minor, i_major)
        i_block = gl.where(in_tail, self.n_tail - 1 - i_major, self.n_query_blocks - 1 - i_minor)
        i_batch = i_row // KV_HEADS
        i_kv_head = i_row - i_batch * KV_HEADS
        i_head = i_kv_head * self.GROUP + i_tile % self.GROUP

        i_row = i_batch.to(gl.int64) * self.MASK_HEADS + i_head % self.MASK_HEADS
        i_list = i_row * self.n_query_blocks + i_block
        p_list = self.p_list + i_list * self.n_key_blocks
        # Both ends of the list are read with the counts, not after them.
        n_full = gl.load(self.p_count + i_list * 2)
        n_partial = gl.load(self.p_count + i_list * 2 + 1)
        i_full = gl.load(p_list).to(gl.int32)
        i_partial = gl.load(p_list + self.n_key_blocks - 1).to(gl.int32)

        n_queries = self.keys.n_queries
        row = self.keys.row(i_batch)
        i_query = max(row.start - row.first, 0) + i_block * self.BLOCK_M
        key_end = min(row.end, row.first + min(i_query + self.BLOCK_M, n_queries))
        n_blocks = n_full + n_partial
        is_empty = n_blocks == 0  # the list holds anything
        i_first = gl.where(n_partial > 0, i_partial, gl.where(is_empty, 0, i_full))
        return Tile(
            i_head, i_kv_head, i_batch, i_query, row.first + i_query, row,
            gl.where(is_empty, row.start, key_end), i_list * self.n_key_blocks, i_first,
            gl.where(is_empty, 1, n_partial), gl.where(i_query < n_queries, max(n_blocks, 1), 0),
        )  # fmt: skip

    @gluon.jit
    def key(self, tile, i):
        """First key of the list's block ``i``: partial blocks from its end, then full ones."""
        i_block = tile.i_first
        if i > 0:
            i_entry = i - tile.n_masked
            if i < tile.n_masked:
                i_entry = self.n_key_blocks - 1 - i
            i_block = gl.load(self.p_list + tile.i_list + i_entry).to(gl.int32)
        return tile.row.start + i_block * self.BLOCK_N

    @gluon.jit
    def kind(self, tile, i):
        """What the block ``i`` is to its tile."""
        kind = gl.where(i == 0, FIRST, 0) | gl.where(i == tile.n_blocks - 1, LAST, 0)
        return kind | gl.where(i < tile.n_masked, MASKED, 0)

    @gluon.jit
    def mask(self, b_scores, note, o_position):
        """-inf where a query does not see a key of a partial block."""
        o_key = self.keys.block_at(note.i_load, note.i_key, self.BLOCK_N, b_scores)
        return mask_partial(self, b_scores, note, note.i_key, o_key, o_position)


@gluon.jit(
    do_not_specialize=[
        "n_batch", "n_query_blocks", "n_key_blocks", "n_tail", "n_queries", "n_keys", "window"
    ]
)  # fmt: skip
def attention_kernel(
    d_q, d_k, d_v, d_out, p_list, p_count, p_bounds, p_q_start,
    n_batch, n_query_blocks, n_key_blocks, n_tail, n_queries, n_keys, window, score_scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, MASK_HEADS: gl.constexpr, BLOCK: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Attend from each query block over its list of KV blocks."""
    keys = Keys(p_bounds, p_q_start, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START)
    problem = Problem(
        keys, p_list, p_count, n_batch, n_query_blocks, n_key_blocks, n_tail, window, score_scale,
        HEADS, GROUP, MASK_HEADS, BLOCK, BLOCK_D, STAGES, HAS_WINDOW,
    )  # fmt: skip
    p_turn = p_count + n_batch * MASK_HEADS * n_query_blocks * 2
    serve(problem, d_q, d_k, d_v, d_out, p_turn)


def launch(
    operands: Sequence[Any],
    blocks: tuple[int, int, int],
    sizes: Sequence[Any],
    constants: Mapping[str, Any],
    sms: int,
) -> None:
    """Start the kernel, for arguments as ``hopper.py`` makes them."""
    batch, query_blocks, _ = blocks
    rows = batch * constants["HEADS"]
    programs = min(rows * query_blocks, sms)
    tail = min(query_blocks // 4, ceil_div(_TAIL * programs, rows))
    attention_kernel[(programs,)](*operands, *blocks, tail, *sizes, STAGES=STAGES, **constants)
