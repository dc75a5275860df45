"""Which keys a tile of queries needs on Hopper: see ``hopper.py`` for the kernel that walks them.

The runs are those of ``triton.py`` in another order, masked ones first: diagonal, edge, sink, full.
Every key is valid here and position 0 is key 0 of the row; padded rows take the portable kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

_UNLIMITED = gl.constexpr(1 << 30)  # the local span of a dense row, in tokens


@aggregate
class Tile:
    """One tile. The last four fields are where each run of key blocks ends, counted in blocks."""

    i_head: gl.tensor
    i_batch: gl.tensor
    i_query: gl.tensor
    low: gl.tensor
    reach: gl.tensor
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
        self, i_head, i_batch, i_query, low, reach, key_begin, key_end, sink_end,
        local_begin, i_full, i_diagonal, n_diagonal, n_edge, n_masked, n_blocks,
    ):  # fmt: skip
        self.i_head = i_head
        self.i_batch = i_batch
        self.i_query = i_query
        self.low = low
        self.reach = reach
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

    @gluon.jit
    def key(self, i, BLOCK_N: gl.constexpr):
        """First key of block ``i``: diagonal, edge, sink, full."""
        i_key = self.i_diagonal + i * BLOCK_N
        if i >= self.n_diagonal:
            i_key = self.local_begin + (i - self.n_diagonal) * BLOCK_N
        if i >= self.n_edge:
            i_key = self.key_begin + (i - self.n_edge) * BLOCK_N
        if i >= self.n_masked:
            i_key = self.i_full + (i - self.n_masked) * BLOCK_N
        return i_key


@aggregate
class Problem:
    """What every group of warps must know: lengths in tokens, routes, and what the mask uses."""

    p_route: gl.tensor
    n_batch: gl.tensor
    n_queries: gl.tensor
    n_keys: gl.tensor
    sink: gl.tensor
    local: gl.tensor
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
    HAS_WINDOW: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, p_route, n_batch, n_queries, n_keys, sink, local, window,
        score_scale, HEADS, GROUP, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, HAS_ROUTE, SPARSE, HAS_WINDOW,
    ):  # fmt: skip
        self.p_route = p_route
        self.n_batch = n_batch
        self.n_queries = n_queries
        self.n_keys = n_keys
        self.sink = sink
        self.local = local
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
        self.HAS_WINDOW = gl.constexpr(HAS_WINDOW)

    @gluon.jit
    def tiles(self):
        """Tiles of the whole launch."""
        n_blocks = (self.n_queries + self.BLOCK_M - 1) // self.BLOCK_M
        return n_blocks * self.n_batch * self.HEADS

    @gluon.jit
    def tile(self, i_tile):
        """Where a tile's queries and key runs lie."""
        i_head = i_tile % self.HEADS
        i_rest = i_tile // self.HEADS
        i_batch = i_rest % self.n_batch
        n_blocks = (self.n_queries + self.BLOCK_M - 1) // self.BLOCK_M
        i_query = (n_blocks - 1 - i_rest // self.n_batch) * self.BLOCK_M
        first = self.n_keys - self.n_queries
        low = first + i_query  # positions of the tile's first and last query
        high = first + min(i_query + self.BLOCK_M, self.n_queries) - 1
        key_begin = gl.to_tensor(0)
        key_end = high + 1
        full_end = low + 1
        full_begin = gl.to_tensor(0)
        if self.HAS_WINDOW:
            key_begin = max(0, low - self.window + 1)
            full_begin = max(0, high - self.window + 1)
        local_begin = key_begin
        sink_end = key_begin
        reach = self.local
        if self.SPARSE:
            if self.HAS_ROUTE:
                if gl.load(self.p_route + i_batch) != 0:
                    reach = _UNLIMITED
                else:
                    reach = self.local
            near_begin = low - reach + 1
            near_full = high - reach + 1
            if near_begin > self.sink:
                sink_end = self.sink
                local_begin = max(key_begin, near_begin)
            if near_full > self.sink:
                full_begin = max(full_begin, near_full)
        N: gl.constexpr = self.BLOCK_N
        n_sink = (max(sink_end - key_begin, 0) + N - 1) // N
        n_edge = (max(min(full_begin, key_end) - local_begin, 0) + N - 1) // N
        i_full = local_begin + n_edge * N
        n_full = max(full_end - i_full, 0) // N
        i_diagonal = i_full + n_full * N
        n_diagonal = (max(key_end - i_diagonal, 0) + N - 1) // N
        return Tile(
            i_head, i_batch, i_query, low, reach, key_begin, key_end, sink_end,
            local_begin, i_full, i_diagonal, n_diagonal, n_diagonal + n_edge,
            n_diagonal + n_edge + n_sink, n_diagonal + n_edge + n_sink + n_full,
        )  # fmt: skip

    @gluon.jit
    def mask(self, b_scores, tile, i, i_key, o_position):
        """-inf where a query does not see a key of masked block ``i``."""
        o_key = i_key + gl.arange(0, self.BLOCK_N, gl.SliceLayout(0, b_scores.type.layout))
        limit = tile.key_end
        if i >= tile.n_edge:
            limit = tile.sink_end
        m_seen = (o_key[None, :] <= o_position[:, None]) & (o_key < limit)[None, :]
        if self.HAS_WINDOW:
            m_seen = m_seen & (o_key[None, :] > o_position[:, None] - self.window)
        if self.SPARSE:
            m_near = o_key[None, :] > o_position[:, None] - tile.reach
            m_seen = m_seen & (m_near | (o_key < self.sink)[None, :])
        return gl.where(m_seen, b_scores, float("-inf"))
