"""The training objective (arXiv 2604.07394, §4.2), as functions of tensors.

For each row of the batch: language-model loss ``+ λ1[task]·d + λ2[task]·d²`` with
``d = mean over layers of (1 − r) − target[task]``, where ``r`` is a layer's share of full
attention. The batch's objective is the mean over its rows. Routers minimise it, the multipliers
maximise it.
"""

from typing import NamedTuple

import torch


class SparsityTerm(NamedTuple):
    """Of each row, fp32 ``[B]``.

    Attributes:
        penalty: ``λ1·d + λ2·d²``.
        sparsity: mean over layers of ``1 − r``.
    """

    penalty: torch.Tensor
    sparsity: torch.Tensor


def sparsity_term(
    shares: torch.Tensor,
    targets: torch.Tensor,
    linear: torch.Tensor,
    quadratic: torch.Tensor,
) -> SparsityTerm:
    """The constraint of each row.

    Args:
        shares: ``[B, L]``, share of full attention of each row and layer.
        targets: ``[B]``, each row's target sparsity.
        linear: ``[B]``, λ1 of each row's task.
        quadratic: ``[B]``, λ2 of each row's task.
    """
    sparsity = 1 - shares.float().mean(dim=1)
    gap = sparsity - targets
    return SparsityTerm(linear * gap + quadratic * gap.square(), sparsity)


def row_means(token_losses: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Mean of each row's token losses; 0 for a row without targets.

    A mean for each row first, rather than one over all tokens of the batch, lets a short answer
    count as much as a long text, and makes the batch's loss the mean of its parts' losses however
    it is split over processes.

    Args:
        token_losses: ``[N]``.
        rows: int64 ``[N]``, the row of each token.
        batch: ``B``.

    Returns:
        ``[B]``, in the dtype of ``token_losses``.
    """
    total = token_losses.new_zeros(batch).index_add(0, rows, token_losses)
    count = torch.bincount(rows, minlength=batch)
    return total / count.clamp(min=1)


def shortfall(row_losses: torch.Tensor) -> torch.Tensor:
    """How far each row's targets are from certain: ``1 − p``, of its mean cross entropy ``[B]``.

    ``p`` is the geometric mean of their probabilities. Bounded by 0 and 1, as a wrong answer is.
    """
    return 1 - row_losses.neg().exp()


def routed_sparsity(shares: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """Share of layers that inference would run sparse: argmax of the logits, the noise taken off.

    ``r = sigmoid((Δlogit + Δnoise)/τ)``, hence ``Δlogit = τ·logit(r) − Δnoise``; a saturated share
    gives an infinite logit of the right sign.

    Args:
        shares: ``[B, L]``, as trained with ``noise`` and ``temperature``.
        noise: ``[B, L, 2]``.
        temperature: τ.

    Returns:
        fp32 ``[B]``.
    """
    shares = shares.detach().float()
    logits = temperature * torch.logit(shares) - (noise[..., 1] - noise[..., 0])
    return (logits <= 0).float().mean(dim=1)
