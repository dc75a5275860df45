"""How a graph names a cache that forgets, and the check that its tokens are the mask's.

A traced model gives every layer a mask over all tokens so far, which a trimmed layer's ring does
not fit. So the layer hands out ``flux::trimmed_cache``: keys of the mask's length that are never
made. The rewrite puts attention over the ring in their place; whoever has no rewrite runs into an
error, not into a wrong answer.
"""

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.registry import register
from fluxcompile.kernels.validation import check_tensor

UNREADABLE = (
    "this layer's cache has been trimmed to sink and local tokens, which only the decode of a "
    'model compiled with backend "flux" and the same routes can read: for anything else start with '
    "a new cache"
)
DISAGREE = (
    "attention_mask: expected as many valid past tokens as the trimmed cache was given, got "
    "another number; pass the mask of the whole sequence, as with the earlier calls"
)


def growing_cache(new: Tensor, sink: int, local: int, spare: int) -> Tensor:
    """Mark a layer whose cache, now with ``new`` ``[B, HK, Sq, D]``, may be trimmed after the call.

    Returns:
        int64 ``[0]``: what stands for the counts of a layer that has not been trimmed.
    """
    return torch.ops.flux.growing_cache(new, sink, local, spare)


def trimmed_cache(
    new: Tensor, ring: Tensor, counts: Tensor, length: int, sink: int, local: int, spare: int
) -> Tensor:
    """The keys (or values) of all ``length`` tokens, the last of them ``new``; never made.

    Args:
        new: ``[B, HK, Sq, D]``.
        ring: ``[B, HK, sink + local + spare + 1, D]``: see :mod:`fluxcompile.kernels.ring.layout`.
        counts: int64 ``[B]``, valid tokens before ``new``.

    Raises:
        KernelError: always, when run.
    """
    return torch.ops.flux.trimmed_cache(new, ring, counts, length, sink, local, spare)


def agree(output: Tensor, same: Tensor) -> Tensor:
    """``output`` ``[B, ...]`` where the bool ``[B]`` ``same`` holds; otherwise an error on a CPU,
    NaN rows on a GPU, which cannot raise without waiting."""
    return torch.ops.flux.agree(output, same)


def _no_counts(new, sink, local, spare):
    return torch.empty(0, dtype=torch.int64, device=new.device)


def _never(*operands):
    raise KernelError(UNREADABLE)


def _all_tokens(new, ring, counts, length, sink, local, spare):
    batch, heads, _, head_dim = new.shape
    return new.new_empty((batch, heads, length, head_dim))


def _check_growing(new, sink, local, spare):
    check_tensor("new", new, new.dtype, ("B", "HK", "Sq", "D"))


def _check_trimmed(new, ring, counts, length, sink, local, spare):
    check_tensor("new", new, new.dtype, ("B", "HK", "Sq", "D"))
    batch, heads, _, head_dim = new.shape
    shape = (batch, heads, sink + local + spare + 1, head_dim)
    check_tensor("ring", ring, new.dtype, shape, device=new.device)
    check_tensor("counts", counts, torch.int64, (batch,), device=new.device)


def _raise_or_keep(output, same):
    if not same.all():
        raise KernelError(DISAGREE)
    return output.clone(memory_format=torch.contiguous_format)


def _poison(output, same):
    rows = same.view(-1, *[1] * (output.dim() - 1))
    return torch.where(rows, output, float("nan")).contiguous()


def _check_agree(output, same):
    check_tensor("same", same, torch.bool, (output.shape[0],), device=output.device)


register(
    "growing_cache", "(Tensor new, int sink, int local, int spare) -> Tensor",
    check=_check_growing, cpu=_no_counts, cuda=_no_counts, fake=_no_counts,
)  # fmt: skip
register(
    "trimmed_cache",
    "(Tensor new, Tensor ring, Tensor counts, SymInt length, int sink, int local, int spare)"
    " -> Tensor",
    check=_check_trimmed, cpu=_never, cuda=_never, fake=_all_tokens,
)  # fmt: skip
register(
    "agree", "(Tensor output, Tensor same) -> Tensor",
    check=_check_agree, cpu=_raise_or_keep, cuda=_poison, fake=lambda output, same:
    torch.empty(output.shape, dtype=output.dtype, device=output.device),
)  # fmt: skip
