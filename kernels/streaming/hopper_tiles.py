"""Which keys a tile of queries needs on Hopper: see ``hopper.py`` for the kernel that walks them.

The runs are those of ``triton.py`` in another order, masked ones first: diagonal, edge, sink, full.

A block is loaded whole, and what lies outside a row's valid keys may hold anything: a product with
NaN is NaN even where the weight is 0. So a block that would reach beyond the row's last valid key
is loaded from further down, and the keys that it then repeats are masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

_UNLIMITED = gl.constexpr(1 << 30)  # the local span of a dense row, in tokens
_BEYOND = gl.constexpr((1 << 31) - 1)  # no key index reaches it


@gluon.jit
def keep_up_to(b_scores, o_key, o_high):
    """Scores of keys ``o_key`` ``[N]`` up to each query's ``o_high`` ``[M]``, the others -inf."""
    return gl.where(o_key[None, :] <= o_high[:, None], b_scores, float("-inf"))


@gluon.jit
def keep_above(b_scores, o_key, o_low):
    """Scores of keys ``o_key`` ``[N]`` above each query's ``o_low`` ``[M]``, the others -inf."""
    return gl.where(o_key[None, :] > o_low[:, None], b_scores, float("-inf"))


@aggregate
class Row:
    """Valid keys ``[start, end)`` of a batch row, and the key index of its first query."""

    start: gl.tensor
    end: gl.tensor
    first: gl.tensor

    @gluon.constexpr_function
    def __init__(self, start, end, first):
        self.start = start
        self.end = end
        self.first = first


@aggregate
class Keys:
    """How the keys of a launch lie: lengths in tokens and, where rows differ, their bounds."""

    p_bounds: gl.tensor
    p_q_start: gl.tensor
    n_queries: gl.tensor
    n_keys: gl.tensor
    HAS_BOUNDS: gl.constexpr
    HAS_Q_START: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, p_bounds, p_q_start, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START):
        self.p_bounds = p_bounds
        self.p_q_start = p_q_start
        self.n_queries = n_queries
        self.n_keys = n_keys
        self.HAS_BOUNDS = gl.constexpr(HAS_BOUNDS)
        self.HAS_Q_START = gl.constexpr(HAS_Q_START)

    @gluon.jit
    def row(self, i_batch):
        start = gl.to_tensor(0)
        end = self.n_keys
        if self.HAS_BOUNDS:
            start = gl.load(self.p_bounds + i_batch * 2)
            end = gl.load(self.p_bounds + i_batch * 2 + 1)
        first = self.n_keys - self.n_queries
        if self.HAS_Q_START:
            first = gl.load(self.p_q_start)
        return Row(start, end, first)

    @gluon.jit
    def load_at(self, row, i_key, BLOCK_N: gl.constexpr):
        """Where the block of key ``i_key`` is loaded from, see above."""
        at = i_key
        if self.HAS_BOUNDS:
            at = min(i_key, row.end - BLOCK_N)
        return at

    @gluon.jit
    def block(self, row, i_key, BLOCK_N: gl.constexpr, b_scores):
        """Indices of the keys that are loaded as the block of ``i_key``, one a column of scores.

        Keys before ``i_key`` are repeated: their index is beyond all others.
        """
        return self.block_at(self.load_at(row, i_key, BLOCK_N), i_key, BLOCK_N, b_scores)

    @gluon.jit
    def block_at(self, i_load, i_key, BLOCK_N: gl.constexpr, b_scores):
        """The same, of a block that is known to be loaded from ``i_load``."""
        columns: gl.constexpr = gl.SliceLayout(0, b_scores.type.layout)
        o_key = i_load + gl.arange(0, BLOCK_N, columns)
        if self.HAS_BOUNDS:
            o_key = gl.where(o_key < i_key, _BEYOND, o_key)
        return o_key


@aggregate
class Tile:
    """One tile. The last four fields are where each run of key blocks ends, counted in blocks."""

    i_head: gl.tensor
    i_batch: gl.tensor
    i_query: gl.tensor
    low: gl.tensor
    row: Row
    reach: gl.tensor
    dense_begin: gl.tensor
    key_begin: gl.tensor
    key_end: gl.tensor
    sink_end: gl.tensor
    local_begin: gl.tensor
    i_full: gl.tensor
    i_diagonal: gl.tensor
    n_diagonal: gl.tensor
    n_edge: gl.tensor
    n_masked: gl.tensor
    n_blocks: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self, i_head, i_batch, i_query, low, row, reach, dense_begin, key_begin, key_end, sink_end,
        local_begin, i_full, i_diagonal, n_diagonal, n_edge, n_masked, n_blocks,
    ):  # fmt: skip
        self.i_head = i_head
        self.i_batch = i_batch
        self.i_query = i_query
        self.low = low
        self.row = row
        self.reach = reach
        self.dense_begin = dense_begin
        self.key_begin = key_begin
        self.key_end = key_end
        self.sink_end = sink_end
        self.local_begin = local_begin
        self.i_full = i_full
        self.i_diagonal = i_diagonal
        self.n_diagonal = n_diagonal
        self.n_edge = n_edge
        self.n_masked = n_masked
        self.n_blocks = n_blocks


@aggregate
class Problem:
    """What every group of warps must know: the rows' keys, routes, and what the mask uses."""

    keys: Keys
    p_route: gl.tensor
    n_batch: gl.tensor
    sink: gl.tensor
    local: gl.tensor
    n_dense: gl.tensor
    window: gl.tensor
    score_scale: gl.tensor
    HEADS: gl.constexpr
    GROUP: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    STAGES: gl.constexpr
    HAS_ROUTE: gl.constexpr
    SPARSE: gl.constexpr
    HAS_DENSE: gl.constexpr
    HAS_WINDOW: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, keys, p_route, n_batch, sink, local, n_dense, window, score_scale, HEADS, GROUP,
        BLOCK_M, BLOCK_N, BLOCK_D, STAGES, HAS_ROUTE, SPARSE, HAS_DENSE, HAS_WINDOW,
    ):  # fmt: skip
        self.keys = keys
        self.p_route = p_route
        self.n_batch = n_batch
        self.sink = sink
        self.local = local
        self.n_dense = n_dense
        self.window = window
        self.score_scale = score_scale
        self.HEADS = gl.constexpr(HEADS)
        self.GROUP = gl.constexpr(GROUP)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_D = gl.constexpr(BLOCK_D)
        self.STAGES = gl.constexpr(STAGES)
        self.HAS_ROUTE = gl.constexpr(HAS_ROUTE)
        self.SPARSE = gl.constexpr(SPARSE)
        self.HAS_DENSE = gl.constexpr(HAS_DENSE)
        self.HAS_WINDOW = gl.constexpr(HAS_WINDOW)

    @gluon.jit
    def tiles(self):
        """Tiles of the whole launch."""
        n_blocks = (self.keys.n_queries + self.BLOCK_M - 1) // self.BLOCK_M
        return n_blocks * self.n_batch * self.HEADS

    @gluon.jit
    def tile(self, i_tile):
        """Where a tile's queries and key runs lie."""
        n_queries = self.keys.n_queries
        i_head = i_tile % self.HEADS
        i_rest = i_tile // self.HEADS
        n_blocks = (n_queries + self.BLOCK_M - 1) // self.BLOCK_M
        i_batch = i_rest // n_blocks
        i_query = (n_blocks - 1 - i_rest % n_blocks) * self.BLOCK_M
        row = self.keys.row(i_batch)
        low = row.first + i_query  # positions of the tile's first and last query
        high = row.first + min(i_query + self.BLOCK_M, n_queries) - 1
        key_begin = row.start
        key_end = min(row.end, high + 1)
        full_end = min(key_end, low + 1)
        full_begin = row.start
        if self.HAS_WINDOW:
            key_begin = max(row.start, low - self.window + 1)
            full_begin = max(row.start, high - self.window + 1)
        local_begin = key_begin
        sink_end = key_begin
        reach = self.local
        dense_begin = row.end
        if self.SPARSE:
            if self.HAS_ROUTE:
                if gl.load(self.p_route + i_batch) != 0:
                    reach = _UNLIMITED
                else:
                    reach = self.local
            sink_stop = row.start + self.sink
            near_begin = min(low, row.end - 1) - reach + 1
            if self.HAS_DENSE:
                dense_begin = min(row.end, row.first + n_queries) - self.n_dense
                if (high >= dense_begin) & (low < row.end):
                    near_begin = row.start
                if (low >= dense_begin) & (high < row.end):
                    reach = _UNLIMITED
                else:
                    reach = reach
            near_full = min(high, row.end - 1) - reach + 1
            if near_begin > sink_stop:
                sink_end = min(sink_stop, key_end)
                local_begin = max(key_begin, near_begin)
            if near_full > sink_stop:
                full_begin = max(full_begin, near_full)
        N: gl.constexpr = self.BLOCK_N
        n_sink = (max(sink_end - key_begin, 0) + N - 1) // N
        n_edge = (max(min(full_begin, key_end) - local_begin, 0) + N - 1) // N
        i_full = local_begin + n_edge * N
        n_full = max(full_end - i_full, 0) // N
        i_diagonal = i_full + n_full * N
        n_diagonal = (max(key_end - i_diagonal, 0) + N - 1) // N
        return Tile(
            i_head, i_batch, i_query, low, row, reach, dense_begin, key_begin, key_end, sink_end,
            local_begin, i_full, i_diagonal, n_diagonal, n_diagonal + n_edge,
            n_diagonal + n_edge + n_sink, n_diagonal + n_edge + n_sink + n_full,
        )  # fmt: skip

    @gluon.jit
    def key(self, tile, i):
        """First key of block ``i``: diagonal, edge, sink, full."""
        i_key = tile.i_diagonal + i * self.BLOCK_N
        if i >= tile.n_diagonal:
            i_key = tile.local_begin + (i - tile.n_diagonal) * self.BLOCK_N
        if i >= tile.n_edge:
            i_key = tile.key_begin + (i - tile.n_edge) * self.BLOCK_N
        if i >= tile.n_masked:
            i_key = tile.i_full + (i - tile.n_masked) * self.BLOCK_N
        return i_key

    @gluon.jit
    def mask(self, b_scores, tile, i, i_key, o_position):
        """-inf where a query does not see a key of masked block ``i``, beginning at ``i_key``.

        Each bound is applied only to blocks that it can cut, which for most blocks is one. What
        depends on the key alone is in the columns' indices and what depends on the query alone in
        its bound: one comparison a score.
        """
        o_key = self.keys.block(tile.row, i_key, self.BLOCK_N, b_scores)
        limit = tile.key_end
        if i >= tile.n_edge:
            limit = tile.sink_end
        high = tile.low + self.BLOCK_M - 1
        if self.HAS_WINDOW:  # noqa: SIM102  known while compiling, the rest is not
            if i_key <= high - self.window:
                b_scores = keep_above(b_scores, o_key, o_position - self.window)
        if self.SPARSE:
            sink_end = tile.row.start + self.sink
            last = tile.row.end - 1
            if (i_key <= min(high, last) - tile.reach) & (i_key + self.BLOCK_N > sink_end):
                o_near = o_position
                if self.keys.HAS_BOUNDS:
                    o_near = gl.minimum(o_position, last)
                o_low = o_near - tile.reach
                if self.HAS_DENSE:
                    m_dense = (o_position >= tile.dense_begin) & (o_position <= last)
                    o_low = gl.where(m_dense, -1, o_low)
                # Sink keys are near to every query.
                o_near_key = gl.where(o_key < sink_end, _BEYOND, o_key)
                b_scores = keep_above(b_scores, o_near_key, o_low)
        at = self.keys.load_at(tile.row, i_key, self.BLOCK_N)
        if (i_key + self.BLOCK_N - 1 > min(tile.low, limit - 1)) | (at < i_key):
            b_scores = keep_up_to(b_scores, o_key, gl.minimum(o_position, limit - 1))
        return b_scores
