"""The differentiable mixture of full and sparse attention (arXiv 2604.07394, training).

A layer's output under training is ``r * FA + (1 - r) * SA`` with
``r = softmax((logits + noise) / temperature)[full]``, one share ``r`` a batch row. Plain torch
functions that trace into the training graph: the partitioner keeps FA and SA in the model's dtype
and recomputes whatever is wider.
"""

from __future__ import annotations

import torch


def full_share(
    logits: torch.Tensor, noise: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Share of full attention in each row, fp32 ``[B]``.

    Args:
        logits: fp32 ``[B, 2]``; class 1 is full attention.
        noise: fp32 ``[B, 2]``, Gumbel noise or zeros.
        temperature: fp32 ``[]``, above 0.
    """
    return ((logits + noise) / temperature).softmax(dim=-1)[:, 1]


def harden(share: torch.Tensor, hardness: torch.Tensor) -> torch.Tensor:
    """The weight that a row is mixed with: its share, drawn towards the 0 or 1 it is nearer to.

    At hardness 1 the forward pass is what inference computes (with noise), while the gradient is
    still the share's: the straight-through estimator. At 0 the weight is the share, as in the
    paper.

    Args:
        share: fp32 ``[B]``.
        hardness: fp32 ``[]``, in [0, 1].
    """
    rounded = (share > 0.5).to(share.dtype)
    return share + (hardness * (rounded - share)).detach()


def mix(full: torch.Tensor, sparse: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """``share * full + (1 - share) * sparse``, exactly one of the two where the share is 1 or 0.

    Taken in fp32 or wider, and as an interpolation: the gradient of the share then sums
    ``grad * (full - sparse)``, small differences that neither rounding in between nor the
    difference of two large sums may drown.

    Args:
        full: ``[B, Sq, H, D]``, and ``sparse`` alike.
        share: fp32 ``[B]``.

    Returns:
        ``[B, Sq, H, D]`` in the dtype of ``full``.
    """
    wide = torch.promote_types(full.dtype, share.dtype)
    weight = share.to(wide)[:, None, None, None]
    return torch.lerp(sparse.to(wide), full.to(wide), weight).to(full.dtype)


def pick(full: torch.Tensor, sparse: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``full`` where ``rows`` (bool ``[B]`` or ``[B|1, Sq]``) says so, elsewhere ``sparse``.

    Both are ``[B, Sq, H, D]``.
    """
    return torch.where(rows.reshape(*rows.shape, *[1] * (4 - rows.dim())), full, sparse)


def dense_queries(
    query: torch.Tensor,
    key_valid: torch.Tensor | None,
    prompt_length: torch.Tensor | None,
    last: int,
    answer: bool,
) -> torch.Tensor:
    """The queries that sparse attention leaves dense: bool ``[B, S]``, or ``[1, S]``.

    Those that inference would: the last ones of the prompt's call, and perhaps all that are
    decoded after it.

    Args:
        query: ``[B, H, S, D]`` of a prompt and its answer: query i sits at key i.
        key_valid: bool ``[B, S]``; None for all valid.
        prompt_length: int64 ``[B]``, how many of a row's first valid tokens are its prompt; None
            where whole rows are prompts.
        last: valid queries at the end of the prompt.
        answer: those after the prompt too.
    """
    length = query.shape[2]
    if key_valid is None:
        rank = torch.arange(length, device=query.device)[None]
        end = length if prompt_length is None else prompt_length[:, None].clamp(max=length)
    else:
        seen = key_valid.to(torch.int64).cumsum(-1)
        rank, end = seen - 1, seen[:, -1:]
        if prompt_length is not None:
            end = torch.minimum(end, prompt_length[:, None])
    dense = rank >= end - last
    if prompt_length is not None and not answer:
        dense = dense & (rank < end)
    return dense if key_valid is None else dense & key_valid
