"""The ``flux::`` operators: schemas, fakes, validation and dispatch.

Importing this module registers the operators and imports no Triton. Operands, shared by all:

=============  =======================  ==========================================================
``q``          ``[B, H, Sq, D]``        queries
``k``, ``v``   ``[B, HK, Skv, D]``      keys and values, not expanded: head h reads h // (H // HK)
``bounds``     int32 ``[B, 2]``         valid keys of a row lie in ``start <= j < end``
``key_valid``  bool ``[B, Skv]``        which keys are valid; may have holes
``flags``      bool ``[4]`` on the CPU  what :mod:`fluxcompile.kernels.masks.flags` lists
``dense_mask`` bool ``[B|1,1,Sq,Skv]``  the mask itself, used only when it is not readable
``q_start``    int32 ``[1]``            key index of query 0; absent: ``Skv - Sq``
``route``      bool ``[B]``             True: the row attends densely; False: sparsely
=============  =======================  ==========================================================

Every result is contiguous and in q's dtype; softmax runs in fp32; a query that may attend to no
key gives zeros. Operands that an operator cannot serve raise :class:`KernelError`, and so do
operands that require grad under grad mode, but for ``full_attention`` and ``streaming_attention``:
these can be differentiated, once, with respect to ``q``, ``k`` and ``v``.
"""

import torch
from torch import Tensor

from fluxcompile.kernels import validation
from fluxcompile.kernels.block_sparse.op import block_sparse_attention
from fluxcompile.kernels.decode import cpu as decode_cpu
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.host_flag.op import await_flag, send_flag
from fluxcompile.kernels.masks import flags, key_masks
from fluxcompile.kernels.materialize import materialize
from fluxcompile.kernels.power.op import power_attention
from fluxcompile.kernels.project_rows.op import project_rows
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.ring.op import agree, growing_cache, ring_cache
from fluxcompile.kernels.router.op import route_features, route_rows
from fluxcompile.kernels.streaming import cpu as streaming_cpu
from fluxcompile.kernels.streaming import cuda as streaming_cuda
from fluxcompile.kernels.streaming.backward.op import differentiable_full, differentiable_streaming
from fluxcompile.kernels.triangle.op import triangle_attention
from fluxcompile.kernels.xattention.op import xattention_attention

__all__ = [
    "agree",
    "await_flag",
    "block_sparse_attention",
    "decode_attention",
    "full_attention",
    "growing_cache",
    "mask_bounds",
    "materialize",
    "power_attention",
    "project_rows",
    "read_mask",
    "ring_cache",
    "route_features",
    "route_rows",
    "send_flag",
    "streaming_attention",
    "triangle_attention",
    "xattention_attention",
]


def mask_bounds(key_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Summarise key validity ``[B, Skv]`` as per-row bounds and host flags (one sync on CUDA).

    Returns:
        ``bounds`` int32 ``[B, 2]`` on key_valid's device (0, 0 for a row without a valid key) and
        ``flags`` bool ``[4]`` on the CPU.
    """
    return torch.ops.flux.mask_bounds(key_valid)


def read_mask(mask: Tensor, q_start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recover *causal and valid keys* from an explicit bool mask ``[B, 1, Sq, Skv]``.

    The last query's row is taken as the key validity; the mask is readable when it equals
    ``(j <= q_start + i) & key_valid`` everywhere (one sync on CUDA).

    Returns:
        ``key_valid`` bool ``[B, Skv]``, ``bounds`` int32 ``[B, 2]`` and ``flags`` bool ``[4]`` on
        the CPU; the first two are well formed whether or not the mask is readable.
    """
    return torch.ops.flux.read_mask(mask, q_start)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None = None,
    key_valid: Tensor | None = None,
    flags: Tensor | None = None,
    dense_mask: Tensor | None = None,
    q_start: Tensor | None = None,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention over the valid keys; operands as in the module's table.

    Args:
        window: a query at key index p sees only ``j > p - window``; 0 for no window.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 for none.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.full_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, window, scale, softcap
    )


def streaming_attention(
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
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """:func:`full_attention` whose sparse rows see only sink and local keys.

    A sparse row's query at key index p also needs ``rank(j) < sink`` or
    ``rank(p) - rank(j) < local``, where ``rank`` counts the valid keys up to and including its
    argument, less one. Without ``route`` every row is sparse. A mask that is not readable is
    applied as it is and routes are ignored.

    Args:
        sink: valid keys kept at the row's beginning, in tokens.
        local: valid keys kept up to and including the query, in tokens.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.streaming_attention(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, route,
        sink, local, window, scale, softcap,
    )  # fmt: skip


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_valid: Tensor | None = None,
    route: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """1 to 8 queries a row, each over ranges read on the device (never a sync on CUDA).

    Args:
        query_bounds: int32 ``[B, Sq, 4]``: ``lo, sink_end, local_start, end``, key indices. A
            dense row's query attends ``lo <= j < end``; a sparse row's ``lo <= j < sink_end`` and
            ``max(lo, local_start) <= j < end``. Nothing else is causal: a query's ``end`` keeps
            it from the tokens of the same step that come after it.
        key_valid: keys outside it are never attended, whatever ``query_bounds`` says.
        route: without it every row is sparse.

    Returns:
        ``[B, Sq, H, D]``.
    """
    return torch.ops.flux.decode_attention(q, k, v, query_bounds, key_valid, route, scale, softcap)


def _decode_attention_cuda(*operands):
    return triton_module("decode").decode_attention(*operands)


def _mask_bounds_fake(key_valid):
    bounds = key_valid.new_empty((key_valid.shape[0], 2), dtype=torch.int32)
    return bounds, torch.empty(flags.COUNT, dtype=torch.bool, device="cpu")


def _read_mask_fake(mask, q_start):
    key_valid = mask.new_empty((mask.shape[0], mask.shape[3]))
    return key_valid, *_mask_bounds_fake(key_valid)


register(
    "mask_bounds",
    "(Tensor key_valid) -> (Tensor bounds, Tensor flags)",
    check=validation.check_key_valid,
    cpu=key_masks.mask_bounds,
    cuda=key_masks.mask_bounds,
    fake=_mask_bounds_fake,
)
register(
    "read_mask",
    "(Tensor mask, Tensor q_start) -> (Tensor key_valid, Tensor bounds, Tensor flags)",
    check=validation.check_mask,
    cpu=key_masks.read_mask,
    cuda=key_masks.read_mask,
    fake=_read_mask_fake,
)
register(
    "full_attention",
    f"(Tensor q, Tensor k, Tensor v, {KEY_MASK}, int window, float scale, float softcap) -> Tensor",
    check=validation.check_full,
    cpu=streaming_cpu.full_attention,
    cuda=streaming_cuda.full_attention,
    fake=attention_fake,
    under_grad=differentiable_full,
)
register(
    "streaming_attention",
    f"(Tensor q, Tensor k, Tensor v, {KEY_MASK}, Tensor? route, "
    "int sink, int local, int window, float scale, float softcap) -> Tensor",
    check=validation.check_streaming,
    cpu=streaming_cpu.streaming_attention,
    cuda=streaming_cuda.streaming_attention,
    fake=attention_fake,
    under_grad=differentiable_streaming,
)
register(
    "decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor query_bounds, Tensor? key_valid, "
    "Tensor? route, float scale, float softcap) -> Tensor",
    check=validation.check_decode,
    cpu=decode_cpu.decode_attention,
    cuda=_decode_attention_cuda,
    fake=attention_fake,
)
