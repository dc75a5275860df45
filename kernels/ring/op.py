"""How a graph names a cache that forgets, and the check that its tokens are the mask's.

A traced model gives every layer a mask over all tokens so far, which a ring does not fit. So the
layer hands out ``flux::ring_cache``: keys of the mask's length that are never made. The rewrite
puts attention over the ring in their place; whoever has no rewrite runs into an error, not into a
wrong answer.
"""

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.registry import register
from fluxcompile.kernels.validation import check_tensor

UNREADABLE = (
    'this layer\'s cache has been laid out for a model compiled with backend "flux", which alone '
    "can read it: expected such a model (not past Dynamo's recompile limit, from where on it runs "
    "eagerly) or a new cache"
)
DISAGREE = (
    "the tokens of the cache are not those of this call: expected attention_mask to be that of the "
    "whole sequence, with as many valid past tokens as earlier calls had, and the tokens to fit "
    "into FluxCache(max_length=...); got something else"
)


def growing_cache(
    new: Tensor,
    pattern: str,
    keys: Tensor | None,
    values: Tensor | None,
    counts: Tensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mark a layer whose cache, now with ``new`` ``[B, HK, Sq, D]``, may become a ring after the
    call.

    Args:
        pattern: the code of a :class:`~fluxcompile.kernels.ring.layout.RingPattern`.
        keys, values, counts, seen: of an earlier prompt, to use again.

    Returns:
        What stands for the counts of a layer that is no ring: int64 ``[0]`` and ``[]``.
    """
    return torch.ops.flux.growing_cache(new, pattern, keys, values, counts, seen)


def ring_cache(
    new: Tensor,
    ring: Tensor,
    counts: Tensor,
    seen: Tensor | None,
    length: int,
    pattern: str,
) -> Tensor:
    """The keys (or values) of all ``length`` tokens, the last of them ``new``; never made.

    Args:
        new: ``[B, HK, Sq, D]``.
        ring: ``[B, HK, slots, D]``: see :mod:`fluxcompile.kernels.ring.layout`.
        counts: int64 ``[B]``, valid tokens before ``new``; negative: not known.
        seen: int64 ``[]``, all tokens before ``new``, where ``length`` is the pattern's ``room``;
            None where it is theirs and that of ``new``.
        pattern: as for :func:`growing_cache`.

    Raises:
        KernelError: always, when run.
    """
    return torch.ops.flux.ring_cache(new, ring, counts, seen, length, pattern)


def agree(output: Tensor, same: Tensor) -> Tensor:
    """``output`` ``[B, ...]`` where the bool ``[B]`` ``same`` holds; otherwise an error on a CPU,
    NaN rows on a GPU, which cannot raise without waiting."""
    return torch.ops.flux.agree(output, same)


def _no_counts(new, *_):
    options = {"dtype": torch.int64, "device": new.device}
    return torch.empty(0, **options), torch.empty((), **options)


def _never(*_):
    raise KernelError(UNREADABLE)


def _all_tokens(new, ring, counts, seen, length, *_):
    batch, heads, _, head_dim = new.shape
    return new.new_empty((batch, heads, length, head_dim))


def _check_growing(new, *_):
    check_tensor("new", new, new.dtype, ("B", "HK", "Sq", "D"))


def _check_ring(new, ring, counts, seen, length, *_):
    check_tensor("new", new, new.dtype, ("B", "HK", "Sq", "D"))
    batch, heads, _, head_dim = new.shape
    check_tensor("ring", ring, new.dtype, (batch, heads, "slots", head_dim), device=new.device)
    check_tensor("counts", counts, torch.int64, (batch,), device=new.device)
    if seen is not None:
        check_tensor("seen", seen, torch.int64, (), device=new.device)


def _raise_or_keep(output, same):
    if not same.all():
        raise KernelError(DISAGREE)
    return output.clone(memory_format=torch.contiguous_format)


def _poison(output, same):
    rows = same.view(-1, *[1] * (output.dim() - 1))
    return torch.where(rows, output, float("nan")).contiguous()


def _same_shape(output, same):
    return torch.empty(output.shape, dtype=output.dtype, device=output.device)


def _check_agree(output, same):
    check_tensor("same", same, torch.bool, (output.shape[0],), device=output.device)


register(
    "growing_cache",
    "(Tensor new, str pattern, Tensor? old_keys, Tensor? old_values, Tensor? old_counts, "
    "Tensor? old_seen) -> (Tensor counts, Tensor seen)",
    check=_check_growing, cpu=_no_counts, cuda=_no_counts, fake=_no_counts, under_grad=_no_counts,
)  # fmt: skip
register(
    "ring_cache",
    "(Tensor new, Tensor ring, Tensor counts, Tensor? seen, SymInt length, str pattern) -> Tensor",
    check=_check_ring, cpu=_never, cuda=_never, fake=_all_tokens, under_grad=_never,
)  # fmt: skip
register(
    "agree", "(Tensor output, Tensor same) -> Tensor",
    check=_check_agree, cpu=_raise_or_keep, cuda=_poison, fake=_same_shape,
)  # fmt: skip
