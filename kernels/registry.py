"""Registers an operator in the ``flux`` namespace: schema, check, implementations and fake."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fluxcompile.errors import KernelError

_LIBRARY = torch.library.Library("flux", "DEF")
#: an operator's operands may have any strides, or must keep those that they have in eager mode
ANY_LAYOUT = torch.Tag.flexible_layout
KEEPS_LAYOUT = torch.Tag.needs_fixed_stride_order

#: how every prefill operator's schema takes its key mask
KEY_MASK = "Tensor? bounds, Tensor? key_valid, Tensor? flags, Tensor? dense_mask, Tensor? q_start"


def register(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    cpu: Callable,
    cuda: Callable,
    fake: Callable,
    under_grad: Callable | None = None,
    layout: torch.Tag = ANY_LAYOUT,
) -> None:
    """Define ``flux::<name><schema>``.

    Args:
        check: raises :class:`KernelError` for operands that the operator cannot serve. It, like
            the three implementations, takes the operator's arguments in order.
        under_grad: what runs instead, on any device, where an operand requires grad under grad
            mode; None: an error.
        layout: ``ANY_LAYOUT`` or ``KEEPS_LAYOUT``.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, layout))
    _LIBRARY.impl(name, _checked(check, cpu), "CPU")
    _LIBRARY.impl(name, _checked(check, cuda), "CUDA")
    _LIBRARY.impl(name, _autograd(name, under_grad), "Autograd", with_keyset=True)
    torch.library.register_fake(f"flux::{name}", _checked(check, fake), lib=_LIBRARY)


def attention_fake(q: Tensor, *operands) -> Tensor:
    """What every attention operator gives for ``q`` ``[B, H, Sq, D]``: ``[B, Sq, H, D]``."""
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim))


def _checked(check: Callable[..., None], implementation: Callable) -> Callable:
    """``implementation`` behind ``check``, both taking the operator's arguments."""

    def kernel(*operands):
        check(*operands)
        return implementation(*operands)

    return kernel


def _autograd(name: str, under_grad: Callable | None) -> Callable:
    """The op's Autograd kernel: ``under_grad`` or an error under grad, else the device's kernel."""
    op = getattr(torch.ops.flux, name).default

    def kernel(keyset, *operands):
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(operands)
        ):
            if under_grad is not None:
                return under_grad(*operands)
            raise KernelError.mismatch(
                f"flux::{name} has no backward",
                "operands that need no gradient, or torch.no_grad()",
                "an operand that requires grad under grad mode",
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *operands)

    return kernel
