"""Full and streaming attention of a prompt on Hopper, warp-specialised, in Gluon.

One persistent program a multiprocessor walks over tiles of 128 queries of one head. Three groups
of warps share it: one *loads* queries, keys and values through the tensor memory accelerator, two
*attend*, 64 queries each. Within an attending group the next block's scores are computed by the
tensor cores while the last block's values are, and while the softmax of the other group runs.

The keys a tile needs are the same four runs as in ``triton.py``; the masked ones come first here:
diagonal, edge, sink, then the full blocks, whose loop has no mask at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from fluxcompile.kernels.launch import ceil_div, limits_of, score_scales
from fluxcompile.kernels.streaming.hopper_tiles import Keys, Problem

# Triton renamed them.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Below every score and finite, so that the running maximum of a query without keys stays finite.
FLOOR = gl.constexpr(-1.0e30)
BLOCK_M = 128  # queries a tile, half of them for each attending group of warps
# Neighbouring tiles a program: the next is loaded while one is finished, which pays where tiles are
# short; the more, the less evenly the multiprocessors finish, where tiles are of unequal length.
CHUNK = 2
REGISTERS = 168  # a thread's share when the groups start; they then trade them
_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True)
class Config:
    """Keys a block, and how many blocks of keys and of values are in shared memory at once."""

    block_n: int
    stages: int


CONFIGS = {
    (head_dim, dtype): config
    for head_dim, config in ((64, Config(128, 3)), (128, Config(128, 2)))
    for dtype in _ELEMENTS
}


@aggregate
class Channels:
    """Shared memory and the barriers that hand it over. ``ready``: filled; ``free``: read."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, out, q_ready, q_free, k_ready, k_free, v_ready, v_free):
        self.q = q
        self.k = k
        self.v = v
        self.out = out
        self.q_ready = q_ready
        self.q_free = q_free
        self.k_ready = k_ready
        self.k_free = k_free
        self.v_ready = v_ready
        self.v_free = v_free


@gluon.jit
def _turns(problem, CHUNK: gl.constexpr):
    """First tile of this program, the end, and the step."""
    first = gl.program_id(0)
    end = problem.tiles()
    step = gl.num_programs(0)
    if CHUNK > 0:
        first = first * CHUNK
        end = min(first + CHUNK, end)
        step = 1
    return first, end, step


@gluon.jit
def _load_queries(problem, channels, d_q, tile, phase):
    """Fill the queries' place once both halves of the tile before have been read."""
    HALF: gl.constexpr = problem.BLOCK_M // 2
    mbarrier.wait(channels.q_free, phase ^ 1)
    mbarrier.expect(channels.q_ready, 2 * d_q.block_type.nbytes)
    for half in gl.static_range(2):
        at = [tile.i_batch, tile.i_head, tile.i_query + half * HALF, 0]
        tma_load(d_q, at, channels.q_ready, channels.q.index(half))


@gluon.jit
def _load(problem, channels, d_q, d_k, d_v, CHUNK: gl.constexpr, AHEAD: gl.constexpr):
    """Fill shared memory, always as far ahead as there is room."""
    n_loaded = 0
    phase = 0
    first, end, step = _turns(problem, CHUNK)
    for i_tile in range(first, end, step):
        tile = problem.tile(i_tile)
        i_kv_head = tile.i_head // problem.GROUP
        if AHEAD:
            if tile.n_blocks == 0:
                _load_queries(problem, channels, d_q, tile, phase)
        else:
            _load_queries(problem, channels, d_q, tile, phase)
        for i in range(tile.n_blocks):
            i_stage = n_loaded % problem.STAGES
            turn = (n_loaded // problem.STAGES) & 1
            i_key = problem.keys.load_at(tile.row, problem.key(tile, i), problem.BLOCK_N)
            at = [tile.i_batch, i_kv_head, i_key, 0]
            k_ready = channels.k_ready.index(i_stage)
            v_ready = channels.v_ready.index(i_stage)
            mbarrier.wait(channels.k_free.index(i_stage), turn ^ 1)
            mbarrier.expect(k_ready, d_k.block_type.nbytes)
            tma_load(d_k, at, k_ready, channels.k.index(i_stage))
            if AHEAD:  # noqa: SIM102  known while compiling, the rest is not
                if i == 0:  # there is room for keys before there is for queries
                    _load_queries(problem, channels, d_q, tile, phase)
            mbarrier.wait(channels.v_free.index(i_stage), turn ^ 1)
            mbarrier.expect(v_ready, d_v.block_type.nbytes)
            tma_load(d_v, at, v_ready, channels.v.index(i_stage))
            n_loaded += 1
        phase ^= 1


@gluon.jit
def _scores(problem, channels, b_q, n_read, b_zero):
    """Start ``q @ k.T`` of the next key block."""
    i_stage = n_read % problem.STAGES
    mbarrier.wait(channels.k_ready.index(i_stage), (n_read // problem.STAGES) & 1)
    b_k = channels.k.index(i_stage).reshape([problem.BLOCK_N, problem.BLOCK_D])
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def values_of(problem, channels, b_weights, n_read, b_out, use_acc=True):
    """Start ``out += weights @ v`` of block ``n_read``, and give what it reads.

    ``use_acc``: False starts from 0.

    Weights arrive in fp32: 16-bit ones, kept from one step to the next, would lie two to a register
    in an order that the tensor cores do not take.
    """
    i_stage = n_read % problem.STAGES
    operand: gl.constexpr = gl.DotOperandLayout(0, b_out.type.layout, 2)
    b_weights = gl.convert_layout(b_weights.to(channels.v.dtype), operand)
    mbarrier.wait(channels.v_ready.index(i_stage), (n_read // problem.STAGES) & 1)
    b_v = channels.v.index(i_stage).reshape([problem.BLOCK_N, problem.BLOCK_D])
    return warpgroup_mma(b_weights, b_v, b_out, use_acc=use_acc, is_async=True), b_weights


@gluon.jit
def _values_done(problem, channels, n_read, values, b_read):
    """The output with the values of block ``n_read``, whose place is given back.

    Their barrier has been waited for before. Once more ends a basic block: within one, ptxas moves
    the wait for the tensor cores before all that is to be computed beside them.
    """
    i_stage = n_read % problem.STAGES
    mbarrier.wait(channels.v_ready.index(i_stage), (n_read // problem.STAGES) & 1)
    b_out, _ = warpgroup_mma_wait(0, deps=[values, b_read])
    mbarrier.arrive(channels.v_free.index(i_stage), count=1)
    return b_out


@gluon.jit
def inverse(b_sum):
    """One over the sum of the weights; a query without keys gets 0 in any case."""
    return 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)


@gluon.jit
def stage(problem, channels, half, b_out):
    """Lay one half of a tile's output where it can be stored from, and give that place."""
    b_staged = channels.out.index(half)
    tma.store_wait(0)  # the last tile's result has left its place
    b_half = b_staged.reshape([problem.BLOCK_M // 2, problem.BLOCK_D])
    b_half.store(b_out.to(channels.k.dtype))
    fence_async_shared()
    return b_staged


@gluon.jit
def _softmax(problem, b_scores, b_max, b_sum):
    """Weights of a block, the factor for what was summed before, and the new statistics."""
    b_max_new = gl.maximum(b_max, gl.max(b_scores, 1) * problem.score_scale)
    b_weights = gl.exp2(b_scores * problem.score_scale - b_max_new[:, None])
    b_decay = gl.exp2(b_max - b_max_new)
    return b_weights, b_decay, b_max_new, b_sum * b_decay + gl.sum(b_weights, 1)


@gluon.jit
def _step(
    problem, channels, tile, i, n_read, b_q, b_zero, b_weights, b_max, b_sum, b_out, o_position,
    MASKED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Scores of block ``i`` and values of block ``i - 1``, the softmax of ``i`` in between."""
    i_key = problem.key(tile, i)
    scores = _scores(problem, channels, b_q, n_read, b_zero)
    values, b_read = values_of(problem, channels, b_weights, n_read - 1, b_out)
    b_scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(channels.k_free.index(n_read % problem.STAGES), count=1)
    if AHEAD:
        mbarrier.arrive(channels.q_free, count=1, pred=i == tile.n_blocks - 1)
    if MASKED:
        b_scores = problem.mask(b_scores, tile, i, i_key, o_position)
    b_weights, b_decay, b_max, b_sum = _softmax(problem, b_scores, b_max, b_sum)
    b_out = _values_done(problem, channels, n_read - 1, values, b_read)
    rows: gl.constexpr = gl.SliceLayout(1, b_out.type.layout)
    b_out = b_out * gl.convert_layout(b_decay, rows)[:, None]
    return b_weights, b_max, b_sum, b_out


@gluon.jit
def _attend(half, problem, channels, d_out, CHUNK: gl.constexpr, AHEAD: gl.constexpr):
    """Attend from one half of each tile's queries."""
    HALF: gl.constexpr = problem.BLOCK_M // 2
    N: gl.constexpr = problem.BLOCK_N
    D: gl.constexpr = problem.BLOCK_D
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    b_zero = gl.full([HALF, N], 0.0, gl.float32, scores_layout)
    b_q = channels.q.index(half).reshape([HALF, D])
    n_read = 0
    phase = 0
    first, end, step = _turns(problem, CHUNK)
    for i_tile in range(first, end, step):
        tile = problem.tile(i_tile)
        o_position = tile.low + half * HALF + gl.arange(0, HALF, rows)
        b_max = gl.full([HALF], FLOOR, gl.float32, rows)
        b_sum = gl.full([HALF], 0.0, gl.float32, rows)
        b_out = gl.full([HALF, D], 0.0, gl.float32, out_layout)
        mbarrier.wait(channels.q_ready, phase)
        phase ^= 1
        if tile.n_blocks > 0:
            i_key = problem.key(tile, 0)
            scores = _scores(problem, channels, b_q, n_read, b_zero)
            b_scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(channels.k_free.index(n_read % problem.STAGES), count=1)
            if AHEAD:
                mbarrier.arrive(channels.q_free, count=1, pred=tile.n_blocks == 1)
            b_scores = problem.mask(b_scores, tile, 0, i_key, o_position)
            b_weights, _, b_max, b_sum = _softmax(problem, b_scores, b_max, b_sum)
            n_read += 1
            for i in range(1, tile.n_masked):
                b_weights, b_max, b_sum, b_out = _step(
                    problem, channels, tile, i, n_read, b_q, b_zero, b_weights, b_max, b_sum,
                    b_out, o_position, True, AHEAD,
                )  # fmt: skip
                n_read += 1
            for i in range(max(tile.n_masked, 1), tile.n_blocks):
                b_weights, b_max, b_sum, b_out = _step(
                    problem, channels, tile, i, n_read, b_q, b_zero, b_weights, b_max, b_sum,
                    b_out, o_position, False, AHEAD,
                )  # fmt: skip
                n_read += 1
            values, b_read = values_of(problem, channels, b_weights, n_read - 1, b_out)
            if not AHEAD:
                mbarrier.arrive(channels.q_free, count=1)
            b_out, _ = warpgroup_mma_wait(0, deps=[values, b_read])
            mbarrier.arrive(channels.v_free.index((n_read - 1) % problem.STAGES), count=1)
        else:
            mbarrier.arrive(channels.q_free, count=1)
        b_out = b_out * gl.convert_layout(inverse(b_sum), out_rows)[:, None]
        b_staged = stage(problem, channels, half, b_out)
        at = [tile.i_batch, tile.i_query + half * HALF, tile.i_head, 0]
        tma_store(d_out, at, b_staged)
    tma.store_wait(0)


@gluon.jit
def serve(problem, d_q, d_k, d_v, d_out, CHUNK: gl.constexpr, AHEAD: gl.constexpr):
    """Hand the tiles that fall to this program to its three groups of warps.

    ``CHUNK`` neighbouring tiles, or, where it is 0, as many as there are for each program.
    ``AHEAD``, for short tiles: the next one's first keys, then its queries, are loaded as soon as
    the last scores of this one are there, not after its last values.
    """
    HALF: gl.constexpr = problem.BLOCK_M // 2
    N: gl.constexpr = problem.BLOCK_N
    D: gl.constexpr = problem.BLOCK_D
    STAGES: gl.constexpr = problem.STAGES
    DTYPE: gl.constexpr = d_k.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    channels = Channels(
        gl.allocate_shared_memory(DTYPE, [2, 1, 1, HALF, D], d_q.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, D], d_k.layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, N, D], d_v.layout),
        gl.allocate_shared_memory(DTYPE, [2, 1, HALF, 1, D], d_out.layout),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    mbarrier.init(channels.q_ready, count=1)
    mbarrier.init(channels.q_free, count=2)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(channels.k_ready.index(i_stage), count=1)
        mbarrier.init(channels.v_ready.index(i_stage), count=1)
        mbarrier.init(channels.k_free.index(i_stage), count=2)
        mbarrier.init(channels.v_free.index(i_stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, problem, channels, d_out, CHUNK, AHEAD)),
            (_attend, (1, problem, channels, d_out, CHUNK, AHEAD)),
            (_load, (problem, channels, d_q, d_k, d_v, CHUNK, AHEAD)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(
    do_not_specialize=["n_batch", "n_queries", "n_keys", "sink", "local", "n_dense", "window"]
)
def attention_kernel(
    d_q, d_k, d_v, d_out, p_bounds, p_q_start, p_route,
    n_batch, n_queries, n_keys, sink, local, n_dense, window, score_scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_ROUTE: gl.constexpr,
    SPARSE: gl.constexpr, HAS_DENSE: gl.constexpr, HAS_WINDOW: gl.constexpr, CHUNK: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Full and streaming attention: the runs of keys of ``hopper_tiles.py``."""
    keys = Keys(p_bounds, p_q_start, n_queries, n_keys, HAS_BOUNDS, HAS_Q_START)
    problem = Problem(
        keys, p_route, n_batch, sink, local, n_dense, window, score_scale, HEADS, GROUP,
        BLOCK_M, BLOCK_N, BLOCK_D, STAGES, HAS_ROUTE, SPARSE, HAS_DENSE, HAS_WINDOW,
    )  # fmt: skip
    serve(problem, d_q, d_k, d_v, d_out, CHUNK, AHEAD)


def serves(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> bool:
    """Whether this kernel takes the operands; from metadata only."""
    return (
        not softcap
        and (q.shape[3], q.dtype) in CONFIGS
        and q.shape[2] > 0
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and all(map(_has_tma_layout, (q, k, v)))
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    *,
    sink: int | None,
    local: int | None,
    window: int,
    scale: float,
    last: int = 0,
    config: Config | None = None,
    ahead: bool = False,
) -> Tensor:
    """Launch :func:`attention_kernel` without reading device data.

    Args:
        q: ``[B, H, Sq, D]``; for the other operands see :mod:`fluxcompile.kernels.ops`.
        bounds: each row has a block of valid keys or more; None: every key is valid.
        sink: None: every row is dense.
        last: queries at the end of each row's valid keys that are dense in sparse rows too.
        config: tile sizes; None: the ones of :data:`CONFIGS`.
        ahead: whether a tile's operands are loaded while the one before is being finished.

    Returns:
        ``[B, Sq, H, D]``.
    """
    batch, heads, queries, head_dim = q.shape
    config = config or CONFIGS[head_dim, q.dtype]
    out = q.new_empty(batch, queries, heads, head_dim)
    tiles = heads * batch * ceil_div(queries, BLOCK_M)
    chunk = CHUNK
    programs = ceil_div(tiles, chunk)
    if sink is not None and route is None and bounds is None and not last:
        # Tiles of equal length: one program a multiprocessor, each with its even share of them.
        chunk = 0
        programs = min(tiles, limits_of(q.device).multiprocessors)
    with torch.cuda.device_of(q):
        attention_kernel[(programs,)](
            *descriptors(q, k, v, out, config.block_n),
            q if bounds is None else bounds.contiguous(),
            q if q_start is None else q_start,
            q if route is None else route.contiguous().view(torch.uint8),
            batch, queries, k.shape[2], sink or 0, local or 0, last, window,
            score_scales(scale, 0.0)[0],
            HEADS=heads, GROUP=heads // k.shape[1], BLOCK_M=BLOCK_M, BLOCK_N=config.block_n,
            BLOCK_D=head_dim, STAGES=config.stages,
            HAS_BOUNDS=bounds is not None, HAS_Q_START=q_start is not None,
            HAS_ROUTE=route is not None, SPARSE=sink is not None, HAS_DENSE=last > 0,
            HAS_WINDOW=window > 0, CHUNK=chunk, AHEAD=ahead,
            num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    return out


def descriptors(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, block_n: int
) -> tuple[TensorDescriptor, ...]:
    """How the four tensors are loaded and stored: half a tile of queries, a block of keys."""
    half, head_dim = BLOCK_M // 2, q.shape[3]
    keys = [1, 1, block_n, head_dim]
    return (
        _descriptor(q, [1, 1, half, head_dim]),
        _descriptor(k, keys),
        _descriptor(v, keys),
        _descriptor(out, [1, half, 1, head_dim]),
    )


def _has_tma_layout(x: Tensor) -> bool:
    """The tensor memory accelerator wants 16-byte strides and no repeated rows."""
    steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    aligned = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[x.dtype])
    # The stride of a dimension of length 1 is never used but must be aligned too.
    strides = [x.stride(i) if x.shape[i] > 1 else x.shape[3] for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
