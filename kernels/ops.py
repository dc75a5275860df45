"""The ``flux::`` operators: schemas, fakes, validation and dispatch.

Importing this module registers the operators and imports no Triton. Operands, shared by all:

=============  =======================  ==========================================================
``q``          ``[B, H, Sq, D]``        queries
``k``, ``v``   ``[B, HK, Skv, D]``      keys and values, not expanded: head h reads h // (H // HK)
``bounds``     int32 ``[B, 2]``         valid keys of a row lie in ``start <= j < end``
``key_valid``  bool ``[B, Skv]``        which keys are valid; may have holes
``flags``      bool ``[3]`` on the CPU  mask readable, every row contiguous, every key valid
``dense_mask`` bool ``[B|1,1,Sq,Skv]``  the mask itself, used only when it is not readable
``q_start``    int32 ``[1]``            key index of query 0; absent: ``Skv - Sq``
``route``      bool ``[B]``             True: the row attends densely; False: sparsely
=============  =======================  ==========================================================

Every result is contiguous and in q's dtype; softmax runs in fp32; a query that may attend to no
key gives zeros. Operands that an operator cannot serve raise :class:`KernelError`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels import validation
from fluxcompile.kernels.decode import cpu as decode_cpu
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.masks import key_masks
from fluxcompile.kernels.streaming import cpu as streaming_cpu
from fluxcompile.kernels.streaming import cuda as streaming_cuda

_LIBRARY = torch.library.Library("flux", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_MASK = "Tensor? bounds, Tensor? key_valid, Tensor? flags, Tensor? dense_mask, Tensor? q_start"
_LIBRARY.define("mask_bounds(Tensor key_valid) -> (Tensor bounds, Tensor flags)", tags=_TAGS)
_LIBRARY.define(
    "read_mask(Tensor mask, Tensor q_start) -> (Tensor key_valid, Tensor bounds, Tensor flags)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"full_attention(Tensor q, Tensor k, Tensor v, {_MASK}, "
    "int window, float scale, float softcap) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    f"streaming_attention(Tensor q, Tensor k, Tensor v, {_MASK}, Tensor? route, "
    "int sink, int local, int window, float scale, float softcap) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor bounds4, Tensor? key_valid, "
    "Tensor? route, float scale, float softcap) -> Tensor",
    tags=_TAGS,
)


def mask_bounds(key_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Summarise key validity ``[B, Skv]`` as per-row bounds and host flags (one sync on CUDA).

    Returns:
        ``bounds`` int32 ``[B, 2]`` on key_valid's device (0, 0 for a row without a valid key) and
        ``flags`` bool ``[3]`` on the CPU.
    """
    return torch.ops.flux.mask_bounds(key_valid)


def read_mask(mask: Tensor, q_start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recover *causal and valid keys* from an explicit bool mask ``[B, 1, Sq, Skv]``.

    The last query's row is taken as the key validity; the mask is readable when it equals
    ``(j <= q_start + i) & key_valid`` everywhere (one sync on CUDA).

    Returns:
        ``key_valid`` bool ``[B, Skv]``, ``bounds`` int32 ``[B, 2]`` and ``flags`` bool ``[3]`` on
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
    bounds4: Tensor,
    key_valid: Tensor | None = None,
    route: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """One query a row over ranges that each row reads on the device (never a sync on CUDA).

    Args:
        bounds4: int32 ``[B, 4]``: ``lo, sink_end, local_start, end``, key indices. A dense row
            attends ``lo <= j < end``; a sparse row ``lo <= j < sink_end`` and
            ``max(lo, local_start) <= j < end``.
        key_valid: keys outside it are never attended, whatever ``bounds4`` says.
        route: without it every row is sparse.

    Returns:
        ``[B, 1, H, D]``.
    """
    return torch.ops.flux.decode_attention(q, k, v, bounds4, key_valid, route, scale, softcap)


def _decode_attention_cuda(*operands):
    return triton_module("decode").decode_attention(*operands)


def _mask_bounds_fake(key_valid):
    bounds = key_valid.new_empty((key_valid.shape[0], 2), dtype=torch.int32)
    return bounds, torch.empty(3, dtype=torch.bool, device="cpu")


def _read_mask_fake(mask, q_start):
    key_valid = mask.new_empty((mask.shape[0], mask.shape[3]))
    return key_valid, *_mask_bounds_fake(key_valid)


def _attention_fake(q, *operands):
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim))


def _checked(check: Callable, implementation: Callable) -> Callable:
    """``implementation`` behind ``check``, both taking the operator's arguments."""

    def kernel(*operands):
        check(*operands)
        return implementation(*operands)

    return kernel


def _no_autograd(name: str) -> Callable:
    """The op's Autograd kernel: an error under grad, otherwise straight to the device's kernel."""
    op = getattr(torch.ops.flux, name).default

    def kernel(keyset, *operands):
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in operands
        ):
            raise KernelError.mismatch(
                f"flux::{name} has no backward",
                "operands that need no gradient, or torch.no_grad()",
                "an operand that requires grad under grad mode",
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *operands)

    return kernel


# name: check, CPU, CUDA, fake
_IMPLEMENTATIONS = {
    "mask_bounds": (
        validation.check_key_valid,
        key_masks.mask_bounds,
        key_masks.mask_bounds,
        _mask_bounds_fake,
    ),
    "read_mask": (
        validation.check_mask,
        key_masks.read_mask,
        key_masks.read_mask,
        _read_mask_fake,
    ),
    "full_attention": (
        validation.check_full,
        streaming_cpu.full_attention,
        streaming_cuda.full_attention,
        _attention_fake,
    ),
    "streaming_attention": (
        validation.check_streaming,
        streaming_cpu.streaming_attention,
        streaming_cuda.streaming_attention,
        _attention_fake,
    ),
    "decode_attention": (
        validation.check_decode,
        decode_cpu.decode_attention,
        _decode_attention_cuda,
        _attention_fake,
    ),
}
for _name, (_check, _cpu, _cuda, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _checked(_check, _cpu), "CPU")
    _LIBRARY.impl(_name, _checked(_check, _cuda), "CUDA")
    _LIBRARY.impl(_name, _no_autograd(_name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"flux::{_name}", _checked(_check, _fake), lib=_LIBRARY)
