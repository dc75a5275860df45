"""``flux::streaming_attention_lse`` and ``flux::streaming_attention_backward``, and autograd.

Operands are those of ``flux::streaming_attention``; ``sink`` and ``local`` None: every row is
dense. Under grad :func:`differentiable_streaming` and
:func:`differentiable_full` run in place of the operators that they are named for.

The log-sum-exp is natural, fp32 (fp64 for fp64 queries) ``[B, H, Sq]``, and infinite for a query
that sees no key.
"""

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.masks.flags import ALL_VALID
from fluxcompile.kernels.registry import KEY_MASK, attention_fake, register
from fluxcompile.kernels.streaming.backward import blocks
from fluxcompile.kernels.validation import check_at_least, check_routed, check_tensor


def differentiable_streaming(*operands) -> Tensor:
    """:func:`fluxcompile.kernels.ops.streaming_attention` with gradients of q, k and v."""
    return _Attention.apply(*operands)[0]


def differentiable_full(q, k, v, bounds, key_valid, flags, dense_mask, q_start, *options) -> Tensor:
    """:func:`fluxcompile.kernels.ops.full_attention` with gradients of q, k and v."""
    return _Attention.apply(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, None, None, None, *options
    )[0]


class _Attention(torch.autograd.Function):
    """Attention and its log-sum-exp, of which only the first can be differentiated, once."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, key_valid, flags, dense_mask, q_start, route, *options):
        mask = bounds, key_valid, flags, dense_mask, q_start, route
        # No gradients are recorded in here: this runs the device's kernel.
        out, lse = torch.ops.flux.streaming_attention_lse(q, k, v, *mask, *options)
        ctx.save_for_backward(q, k, v, *mask, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        *operands, out, lse = ctx.saved_tensors
        gradients = torch.ops.flux.streaming_attention_backward(
            grad_out, out, lse, *operands, *ctx.options
        )
        others = len(operands) - len(gradients) + len(ctx.options)
        return *gradients, *[None] * others


def _check(*operands):
    *routed, sink, local, window, scale, softcap = operands
    check_routed(*routed, window, scale, softcap)
    if (sink is None) != (local is None):
        raise KernelError.mismatch("sink and local", "both or none", (sink, local))
    if sink is not None:
        check_at_least("sink", sink, 0)
        check_at_least("local", local, 1)


def _check_backward(grad_out, out, lse, *operands):
    _check(*operands)
    q = operands[0]
    batch, heads, queries, head_dim = q.shape
    for name, x in (("grad_out", grad_out), ("out", out)):
        check_tensor(name, x, q.dtype, (batch, queries, heads, head_dim), device=q.device)
    check_tensor("lse", lse, _lse_dtype(q), (batch, heads, queries), device=q.device)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _attend(q, k, v, bounds, key_valid, flags, dense_mask, q_start, route, *options):
    sink, local, window, scale, softcap = options
    mask = bounds, key_valid, flags, dense_mask, q_start, route
    in_torch = blocks.find_blocks(q, k, v, *mask, sink=sink, local=local, window=window)
    if in_torch is not None:
        k, v, found = in_torch
        return blocks.attend(q, k, v, found, scale=scale, softcap=softcap)
    out, lse = _attend_fake(q)
    triton_module("streaming").attention(
        q, k, v, _ranges(bounds, flags), q_start, route, out=out, lse=lse,
        sink=sink, local=local, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    return out, lse


def _attend_fake(q, *operands):
    return attention_fake(q), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _differentiate(
    grad_out, out, lse, q, k, v, bounds, key_valid, flags, dense_mask, q_start, route, *options
):
    sink, local, window, scale, softcap = options
    mask = bounds, key_valid, flags, dense_mask, q_start, route
    gradients = _differentiate_fake(grad_out, out, lse, q, k, v)
    in_torch = blocks.find_blocks(q, k, v, *mask, sink=sink, local=local, window=window)
    if in_torch is not None:
        k, v, found = in_torch
        wide = blocks.differentiate(grad_out, lse, q, k, v, found, scale=scale, softcap=softcap)
        for gradient, x in zip(gradients, wide, strict=True):
            gradient.copy_(x)
        return gradients
    triton_module("streaming.backward").differentiate(
        gradients, grad_out, out, lse, q, k, v, _ranges(bounds, flags), q_start, route,
        sink=sink, local=local, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip
    return gradients


def _differentiate_fake(grad_out, out, lse, q, k, v, *operands):
    """Laid out as models make queries, ``[B, S, H, D]``, whatever the operands' own strides."""
    return tuple(
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for x in (q, k, v)
    )


def _ranges(bounds: Tensor | None, flags: Tensor | None) -> Tensor | None:
    """None where every key is valid: the kernels then need no bounds."""
    return None if flags is None or flags[ALL_VALID] else bounds


_OPERANDS = f"Tensor q, Tensor k, Tensor v, {KEY_MASK}, Tensor? route"
_OPTIONS = "int? sink, int? local, int window, float scale, float softcap"

register(
    "streaming_attention_lse",
    f"({_OPERANDS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    check=_check,
    cpu=_attend,
    cuda=_attend,
    fake=_attend_fake,
    under_grad=_Attention.apply,
)
register(
    "streaming_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_OPERANDS}, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    check=_check_backward,
    cpu=_differentiate,
    cuda=_differentiate,
    fake=_differentiate_fake,
)
