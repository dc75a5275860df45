"""The groups of warps of block-sparse attention on Hopper: short tiles, one flow of blocks.

One persistent program a multiprocessor. Its *loading* group takes one tile of 128 queries after
another and lays out the tiles' KV blocks as a single sequence; two *attending* groups, 64 queries
each, walk that sequence and never see a border between tiles but in a block's *note*, which says
whether it is the first or the last of its tile. A step of theirs is the scores of block ``n`` and
the values of block ``n - 1``, whichever tiles the two are of: the next tile's first scores are
computed while this tile's last values are, and a finished tile is written while the scores after it
are computed. Sparse rows have tiles of two or three blocks, so borders are most of what there is.

Who waits for whom. Block ``n`` is turn ``n // STAGES`` of stage ``n % STAGES``, tile ``t`` the same
of the places for queries. Each barrier completes one phase a turn:

========= ======== ====================================== ====================================
barrier   arrivals who arrives                            who waits
========= ======== ====================================== ====================================
k_ready   1        loader: note written, keys on their way attending, before scores of ``n``
k_free    2        attending, scores of ``n`` are there   loader, before note and keys of the
                                                          next turn
v_ready   1        loader: values on their way            attending, before values of ``n``
v_free    2        attending, values of ``n`` are there   loader, before the next turn
q_ready   1        loader: queries on their way           attending, at a tile's first block
q_free    2        attending, a tile's last scores are    loader, before the next turn
                   there
========= ======== ====================================== ====================================

The loader issues keys (and, for a tile's first block, queries) of ``n`` before values of ``n - 1``.
No circle: keys of ``n`` wait for scores of ``n - STAGES``; queries of ``t`` for the last scores of
tile ``t - STAGES``, which are of block ``n - STAGES`` or before, as every tile has a block; values
of ``n - 1`` for values of ``n - 1 - STAGES``. All are over with step ``n - STAGES``, and that needs
only keys of ``n - STAGES`` and values of the block before, both issued earlier. A note without keys
ends the sequence, after the last block, or at once where a program gets no tile: it is waited for
like any block, and nobody gives back its place. What a note says is read before its keys are freed,
and the loader writes the next one only then.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from fluxcompile.kernels.streaming.hopper import (
    FLOOR,
    Channels,
    inverse,
    stage,
    tma_load,
    tma_store,
    values_of,
)

# Kinds of block, in its note.
FIRST = gl.constexpr(1)
LAST = gl.constexpr(2)
MASKED = gl.constexpr(4)
END = gl.constexpr(8)
_FIELDS = gl.constexpr(8)  # words a note
# Registers of a thread that attends and of one that loads, once the groups have traded them.
_ATTENDING = gl.constexpr(240)
_LOADING = gl.constexpr(24)


@aggregate
class Note:
    """What the attending groups must know of a block, and of the tile it is of."""

    kind: gl.tensor
    i_key: gl.tensor
    i_load: gl.tensor
    low: gl.tensor
    key_end: gl.tensor
    i_query: gl.tensor
    i_row: gl.tensor

    @gluon.constexpr_function
    def __init__(self, kind, i_key, i_load, low, key_end, i_query, i_row):
        self.kind = kind
        self.i_key = i_key
        self.i_load = i_load
        self.low = low
        self.key_end = key_end
        self.i_query = i_query
        self.i_row = i_row


@gluon.jit
def _write_note(problem, notes, i_stage, kind, tile, i_key, i_load):
    """Lay a block's note beside where its keys will be."""
    layout: gl.constexpr = gl.BlockedLayout([_FIELDS], [32], [1], [0])
    o_field = gl.arange(0, _FIELDS, layout)
    i_row = tile.i_batch * problem.HEADS + tile.i_head
    b_note = gl.where(o_field == 0, kind, i_row)
    b_note = gl.where(o_field == 1, i_key, b_note)
    b_note = gl.where(o_field == 2, i_load, b_note)
    b_note = gl.where(o_field == 3, tile.low, b_note)
    b_note = gl.where(o_field == 4, tile.key_end, b_note)
    b_note = gl.where(o_field == 5, tile.i_query, b_note)
    notes.index(i_stage).store(b_note)


@gluon.jit
def _read_note(problem, channels, notes, n):
    """Wait for block ``n`` and read its note."""
    i_stage = n % problem.STAGES
    layout: gl.constexpr = gl.BlockedLayout([_FIELDS], [32], [4], [0])
    mbarrier.wait(channels.k_ready.index(i_stage), (n // problem.STAGES) & 1)
    o_field = gl.arange(0, _FIELDS, layout)
    b_note = notes.index(i_stage).load(layout)
    return Note(
        gl.sum(gl.where(o_field == 0, b_note, 0), 0),
        gl.sum(gl.where(o_field == 1, b_note, 0), 0),
        gl.sum(gl.where(o_field == 2, b_note, 0), 0),
        gl.sum(gl.where(o_field == 3, b_note, 0), 0),
        gl.sum(gl.where(o_field == 4, b_note, 0), 0),
        gl.sum(gl.where(o_field == 5, b_note, 0), 0),
        gl.sum(gl.where(o_field == 6, b_note, 0), 0),
    )


@gluon.jit
def _take(p_turn, wanted):
    """Ask for the next turn. Only one lane does, and nothing waits for the answer here."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_lane = gl.arange(0, 32, layout)
    b_one = gl.full([32], 1, gl.int32, layout)
    m_lane = (o_lane == 0) & wanted
    return gl.atomic_add(p_turn + o_lane * 0, b_one, mask=m_lane, sem="relaxed")


@gluon.jit
def _taken(b_turn, end):
    """The tile of the turn that was asked for; a program's first is that of its own index."""
    o_lane = gl.arange(0, 32, b_turn.type.layout)
    i_next = gl.num_programs(0) + gl.max(gl.where(o_lane == 0, b_turn, 0), 0)
    return min(i_next, end)


@gluon.jit
def _load_values(problem, channels, d_v, n, i_batch, i_kv_head, i_load):
    """Fill the place of block ``n``'s values once those of the turn before have been read."""
    i_stage = n % problem.STAGES
    v_ready = channels.v_ready.index(i_stage)
    mbarrier.wait(channels.v_free.index(i_stage), ((n // problem.STAGES) & 1) ^ 1)
    mbarrier.expect(v_ready, d_v.block_type.nbytes)
    tma_load(d_v, [i_batch, i_kv_head, i_load, 0], v_ready, channels.v.index(i_stage))


@gluon.jit
def _load(problem, channels, notes, d_q, d_k, d_v, p_turn):
    """Take tiles and fill shared memory, always as far ahead as there is room.

    A turn is asked for as late as it can be without waiting for the answer: tiles that a program
    holds and has not begun are what keeps the others waiting in the end.
    """
    HALF: gl.constexpr = problem.BLOCK_M // 2
    S: gl.constexpr = problem.STAGES
    n = 0
    n_tiles = 0
    end = problem.tiles()
    i_tile = gl.program_id(0)
    tile = problem.tile(min(i_tile, end - 1))
    # of the block before
    i_batch = gl.to_tensor(0)
    i_kv_head = gl.to_tensor(0)
    i_load = gl.to_tensor(0)
    while i_tile < end:
        b_turn = _take(p_turn, tile.n_blocks == 0)
        for i in range(tile.n_blocks):
            i_stage = n % S
            i_key = problem.key(tile, i)
            i_from = problem.keys.load_at(tile.row, i_key, problem.BLOCK_N)
            k_ready = channels.k_ready.index(i_stage)
            if i == tile.n_blocks - 1:
                b_turn = _take(p_turn, True)
            mbarrier.wait(channels.k_free.index(i_stage), ((n // S) & 1) ^ 1)
            _write_note(problem, notes, i_stage, problem.kind(tile, i), tile, i_key, i_from)
            mbarrier.expect(k_ready, d_k.block_type.nbytes)
            at = [tile.i_batch, tile.i_kv_head, i_from, 0]
            tma_load(d_k, at, k_ready, channels.k.index(i_stage))
            if i == 0:
                i_place = n_tiles % S
                q_ready = channels.q_ready.index(i_place)
                mbarrier.wait(channels.q_free.index(i_place), ((n_tiles // S) & 1) ^ 1)
                mbarrier.expect(q_ready, 2 * d_q.block_type.nbytes)
                for half in gl.static_range(2):
                    at = [tile.i_batch, tile.i_head, tile.i_query + half * HALF, 0]
                    tma_load(d_q, at, q_ready, channels.q.index(i_place * 2 + half))
                n_tiles += 1
            if n > 0:
                _load_values(problem, channels, d_v, n - 1, i_batch, i_kv_head, i_load)
            i_batch = tile.i_batch
            i_kv_head = tile.i_kv_head
            i_load = i_from
            n += 1
        i_tile = _taken(b_turn, end)
        tile = problem.tile(min(i_tile, end - 1))
    i_stage = n % S
    mbarrier.wait(channels.k_free.index(i_stage), ((n // S) & 1) ^ 1)
    _write_note(problem, notes, i_stage, END, tile, 0, 0)
    mbarrier.arrive(channels.k_ready.index(i_stage), count=1)
    if n > 0:
        _load_values(problem, channels, d_v, n - 1, i_batch, i_kv_head, i_load)


@gluon.jit
def _scores(problem, channels, half, n, n_tiles, note, b_zero):
    """Start ``q @ k.T`` of block ``n``, whose keys are there, and of queries ``n_tiles - 1``."""
    S: gl.constexpr = problem.STAGES
    i_place = (n_tiles - 1) % S
    turn = ((n_tiles - 1) // S) & 1
    mbarrier.wait(channels.q_ready.index(i_place), turn, pred=(note.kind & FIRST) != 0)
    b_q = channels.q.index(i_place * 2 + half).reshape([problem.BLOCK_M // 2, problem.BLOCK_D])
    b_k = channels.k.index(n % S).reshape([problem.BLOCK_N, problem.BLOCK_D])
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _release(problem, channels, n, n_tiles, note):
    """Give back what the scores of block ``n`` were computed from."""
    mbarrier.arrive(channels.k_free.index(n % problem.STAGES), count=1)
    if (note.kind & LAST) != 0:
        mbarrier.arrive(channels.q_free.index((n_tiles - 1) % problem.STAGES), count=1)


@gluon.jit
def _softmax(problem, b_scores, b_max, b_sum, is_first):
    """Weights of a block and the new statistics; and by what the output so far is to be scaled.

    That is the change of the maximum, but at a tile's first block, where the output is that of the
    whole tile before, one over the sum of its weights.
    """
    b_last = gl.where(is_first, FLOOR, b_max)
    b_max = gl.maximum(b_last, gl.max(b_scores, 1) * problem.score_scale)
    b_weights = gl.exp2(b_scores * problem.score_scale - b_max[:, None])
    b_decay = gl.exp2(b_last - b_max)
    b_factor = gl.where(is_first, inverse(b_sum), b_decay)
    b_sum = gl.where(is_first, 0.0, b_sum * b_decay) + gl.sum(b_weights, 1)
    return b_weights, b_max, b_sum, b_factor


@gluon.jit
def _masked(problem, b_scores, half, note):
    """Mask the scores of a block, if it is one to be masked."""
    HALF: gl.constexpr = problem.BLOCK_M // 2
    if (note.kind & MASKED) != 0:
        rows: gl.constexpr = gl.SliceLayout(1, b_scores.type.layout)
        o_position = note.low + half * HALF + gl.arange(0, HALF, rows)
        b_scores = problem.mask(b_scores, note, o_position)
    return b_scores


@gluon.jit
def _write(problem, channels, half, d_out, b_out, i_query, i_row):
    """Start to write one half of the output of the tile that a note placed."""
    HALF: gl.constexpr = problem.BLOCK_M // 2
    b_staged = stage(problem, channels, half, b_out)
    i_batch = i_row // problem.HEADS
    at = [i_batch, i_query + half * HALF, i_row - i_batch * problem.HEADS, 0]
    tma_store(d_out, at, b_staged)


@gluon.jit
def _attend(half, problem, channels, notes, d_out):
    """Attend from one half of each tile's queries."""
    HALF: gl.constexpr = problem.BLOCK_M // 2
    N: gl.constexpr = problem.BLOCK_N
    D: gl.constexpr = problem.BLOCK_D
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    b_zero = gl.full([HALF, N], 0.0, gl.float32, scores_layout)
    b_max = gl.full([HALF], FLOOR, gl.float32, rows)
    b_sum = gl.full([HALF], 0.0, gl.float32, rows)
    b_out = gl.full([HALF, D], 0.0, gl.float32, out_layout)
    note = _read_note(problem, channels, notes, 0)
    if note.kind != END:
        n_tiles = 1
        scores = _scores(problem, channels, half, 0, n_tiles, note, b_zero)
        b_scores = warpgroup_mma_wait(0, deps=[scores])
        _release(problem, channels, 0, n_tiles, note)
        b_scores = _masked(problem, b_scores, half, note)
        b_weights, b_max, b_sum, b_factor = _softmax(
            problem, b_scores, b_max, b_sum, note.kind != END
        )
        is_first = gl.to_tensor(FIRST)  # whether the block before was a tile's first
        i_query = note.i_query  # its tile's place
        i_row = note.i_row
        # And the place of the tile before that. Not the same value: Triton takes a variable that a
        # loop assigns what it was before the loop for one that the loop does not change.
        i_done_query = gl.to_tensor(0)
        i_done_row = gl.to_tensor(0)
        n = 1
        note = _read_note(problem, channels, notes, 1)
        while note.kind != END:
            begins = note.kind & FIRST
            n_tiles += begins
            scores = _scores(problem, channels, half, n, n_tiles, note, b_zero)
            if (is_first != 0) & (n > 1):
                _write(problem, channels, half, d_out, b_out, i_done_query, i_done_row)
            values, b_read = values_of(problem, channels, b_weights, n - 1, b_out, is_first == 0)
            b_scores = warpgroup_mma_wait(1, deps=[scores])
            _release(problem, channels, n, n_tiles, note)
            b_scores = _masked(problem, b_scores, half, note)
            b_weights, b_max, b_sum, b_factor = _softmax(
                problem, b_scores, b_max, b_sum, begins != 0
            )
            b_out, _ = warpgroup_mma_wait(0, deps=[values, b_read])
            mbarrier.arrive(channels.v_free.index((n - 1) % problem.STAGES), count=1)
            b_out = b_out * gl.convert_layout(b_factor, out_rows)[:, None]
            is_first = begins
            i_done_query = i_query
            i_done_row = i_row
            i_query = note.i_query
            i_row = note.i_row
            n += 1
            note = _read_note(problem, channels, notes, n)
        if (is_first != 0) & (n > 1):
            _write(problem, channels, half, d_out, b_out, i_done_query, i_done_row)
        values, b_read = values_of(problem, channels, b_weights, n - 1, b_out, is_first == 0)
        b_out, _ = warpgroup_mma_wait(0, deps=[values, b_read])
        b_out = b_out * gl.convert_layout(inverse(b_sum), out_rows)[:, None]
        _write(problem, channels, half, d_out, b_out, i_query, i_row)
        tma.store_wait(0)


@gluon.jit
def serve(problem, d_q, d_k, d_v, d_out, p_turn):
    """Hand the tiles that fall to this program to its three groups of warps.

    Args:
        p_turn: int32, 0 at the launch: how many tiles have been taken beyond a program's first.
    """
    HALF: gl.constexpr = problem.BLOCK_M // 2
    N: gl.constexpr = problem.BLOCK_N
    D: gl.constexpr = problem.BLOCK_D
    S: gl.constexpr = problem.STAGES
    DTYPE: gl.constexpr = d_k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [S, _FIELDS], words)
    channels = Channels(
        gl.allocate_shared_memory(DTYPE, [2 * S, 1, 1, HALF, D], d_q.layout),
        gl.allocate_shared_memory(DTYPE, [S, 1, 1, N, D], d_k.layout),
        gl.allocate_shared_memory(DTYPE, [S, 1, 1, N, D], d_v.layout),
        gl.allocate_shared_memory(DTYPE, [2, 1, HALF, 1, D], d_out.layout),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [S, 1], barrier),
    )
    for i_stage in gl.static_range(S):
        mbarrier.init(channels.q_ready.index(i_stage), count=1)
        mbarrier.init(channels.k_ready.index(i_stage), count=1)
        mbarrier.init(channels.v_ready.index(i_stage), count=1)
        mbarrier.init(channels.q_free.index(i_stage), count=2)
        mbarrier.init(channels.k_free.index(i_stage), count=2)
        mbarrier.init(channels.v_free.index(i_stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, problem, channels, notes, d_out)),
            (_attend, (1, problem, channels, notes, d_out)),
            (_load, (problem, channels, notes, d_q, d_k, d_v, p_turn)),
        ],
        [4, 1],
        [_ATTENDING, _LOADING],
    )
