"""Block-sparse attention of long rows on Hopper: the groups of warps that streaming attention has
walk lists of blocks instead of runs of keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from fluxcompile.kernels.launch import ceil_div
from fluxcompile.kernels.streaming.hopper import CONFIGS, serve
from fluxcompile.kernels.streaming.hopper_tiles import Keys, Row, keep_above, keep_up_to

#: blocks of keys and of values in shared memory at once, by head dim
STAGES = {head_dim: config.stages for (head_dim, _), config in CONFIGS.items()}
MAX_CHUNK = 8  # neighbouring tiles a program: a sparse row's tiles are short
# Programs for each multiprocessor that are worth more than longer chunks: tiles are of very unequal
# length, and a program too many that starts last keeps all others waiting.
_TURNS = 6


@aggregate
class Tile:
    """One query block of one head. Its list begins at entry ``i_list``; partial blocks first."""

    i_head: gl.tensor
    i_batch: gl.tensor
    i_query: gl.tensor
    low: gl.tensor
    row: Row
    key_end: gl.tensor
    i_list: gl.tensor
    n_masked: gl.tensor
    n_blocks: gl.tensor

    @gluon.constexpr_function
    def __init__(self, i_head, i_batch, i_query, low, row, key_end, i_list, n_masked, n_blocks):
        self.i_head = i_head
        self.i_batch = i_batch
        self.i_query = i_query
        self.low = low
        self.row = row
        self.key_end = key_end
        self.i_list = i_list
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
        self, keys, p_list, p_count, n_batch, n_query_blocks, n_key_blocks, window, score_scale,
        HEADS, GROUP, MASK_HEADS, BLOCK, BLOCK_D, STAGES, HAS_WINDOW,
    ):  # fmt: skip
        self.keys = keys
        self.p_list = p_list
        self.p_count = p_count
        self.n_batch = n_batch
        self.n_query_blocks = n_query_blocks
        self.n_key_blocks = n_key_blocks
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
        n_queries = self.keys.n_queries
        # One KV head after another: its chosen blocks are still cached for the next queries.
        KV_HEADS: gl.constexpr = self.HEADS // self.GROUP
        i_part = i_tile // self.GROUP
        i_block = self.n_query_blocks - 1 - i_part % self.n_query_blocks
        i_kv_head = (i_part // self.n_query_blocks) % KV_HEADS
        i_head = i_kv_head * self.GROUP + i_tile % self.GROUP
        i_batch = i_part // self.n_query_blocks // KV_HEADS
        row = self.keys.row(i_batch)
        i_query = max(row.start - row.first, 0) + i_block * self.BLOCK_M
        key_end = min(row.end, row.first + min(i_query + self.BLOCK_M, n_queries))
        i_row = i_batch.to(gl.int64) * self.MASK_HEADS + i_head % self.MASK_HEADS
        i_list = i_row * self.n_query_blocks + i_block
        n_full = gl.load(self.p_count + i_list * 2)
        n_partial = gl.load(self.p_count + i_list * 2 + 1)
        return Tile(
            i_head, i_batch, i_query, row.first + i_query, row, key_end,
            i_list * self.n_key_blocks, n_partial, n_full + n_partial,
        )  # fmt: skip

    @gluon.jit
    def key(self, tile, i):
        """First key of the list's block ``i``: partial blocks from its end, then full ones."""
        i_entry = i - tile.n_masked
        if i < tile.n_masked:
            i_entry = self.n_key_blocks - 1 - i
        return tile.row.start + gl.load(self.p_list + tile.i_list + i_entry).to(gl.int32) * (
            self.BLOCK_N
        )

    @gluon.jit
    def mask(self, b_scores, tile, i, i_key, o_position):
        """-inf where a query does not see a key of a partial block, which begins at ``i_key``."""
        o_key = self.keys.block(tile.row, i_key, self.BLOCK_N, b_scores)
        return mask_partial(self, b_scores, tile, i_key, o_key, o_position)


@gluon.jit
def mask_partial(problem, b_scores, place, i_key, o_key, o_position):
    """-inf where a query does not see one of keys ``o_key`` of the block that begins at ``i_key``.

    ``place``: has the first query's position, ``low``, and the end of the keys, ``key_end``.
    """
    if problem.HAS_WINDOW:  # noqa: SIM102  known while compiling, the rest is not
        if i_key <= place.low + problem.BLOCK_M - 1 - problem.window:
            b_scores = keep_above(b_scores, o_key, o_position - problem.window)
    return keep_up_to(b_scores, o_key, gl.minimum(o_position, place.key_end - 1))


@gluon.jit(
    do_not_specialize=["n_batch", "n_query_blocks", "n_key_blocks", "n_queries", "n_keys", "window"]
)
def attention_kernel(
    d_q, d_k, d_v, d_out, p_list, p_count, p_bounds, p_q_start,
    n_batch, n_query_blocks, n_key_blocks, n_queries, n_keys, window, score_scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, MASK_HEADS: gl.constexpr, BLOCK: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_WINDOW: gl.constexpr,
    CHUNK: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Attend from each query block over its list of KV blocks."""
    keys = Keys(p_bounds, p_q_start, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START)
    problem = Problem(
        keys, p_list, p_count, n_batch, n_query_blocks, n_key_blocks, window, score_scale,
        HEADS, GROUP, MASK_HEADS, BLOCK, BLOCK_D, STAGES, HAS_WINDOW,
    )  # fmt: skip
    serve(problem, d_q, d_k, d_v, d_out, CHUNK, AHEAD)


def launch(
    operands: Sequence[Any],
    blocks: tuple[int, int, int],
    sizes: Sequence[Any],
    constants: Mapping[str, Any],
    sms: int,
    *,
    chunk: int | None = None,
    ahead: bool = True,
) -> None:
    """Start the kernel, for arguments as ``hopper.py`` makes them.

    Args:
        chunk: neighbouring tiles a program; None: see :func:`choose_chunk`.
        ahead: whether a tile's operands are loaded while the one before is being finished.
    """
    batch, query_blocks, _ = blocks
    tiles = batch * constants["HEADS"] * query_blocks
    chunk = chunk or choose_chunk(tiles, sms)
    attention_kernel[(ceil_div(tiles, chunk),)](
        *operands, *blocks, *sizes,
        STAGES=STAGES[constants["BLOCK_D"]], CHUNK=chunk, AHEAD=ahead, **constants,
    )  # fmt: skip


def choose_chunk(tiles: int, sms: int) -> int:
    """Tiles a program, a power of two: as many as leave each multiprocessor several programs."""
    most = max(1, min(tiles // (_TURNS * sms), MAX_CHUNK))
    return 1 << (most.bit_length() - 1)
