"""Lagrange multipliers of the sparsity targets, two for each task."""

from collections.abc import Sequence

import torch
from torch import nn

from fluxcompile.errors import ConfigError


class Multipliers(nn.Module):
    """λ1 and λ2 of each task: trained by gradient ascent, kept at 0 or above.

    The optimiser ascends (AdamW's ``maximize``) and :meth:`project` follows each of its steps.

    Args:
        targets: target sparsity of each of the ``T`` tasks.
        initial: first value of every multiplier.

    Attributes:
        linear: fp32 ``[T]``, λ1.
        quadratic: fp32 ``[T]``, λ2.
        targets: fp32 ``[T]``, a buffer.

    Raises:
        ConfigError: no task, a target outside [0, 1], or a negative initial value.
    """

    def __init__(self, targets: Sequence[float], initial: float = 0.0) -> None:
        super().__init__()
        if not targets or not all(0 <= target <= 1 for target in targets):
            raise ConfigError.mismatch("targets", "sparsities in [0, 1]", f"{list(targets)}")
        if not initial >= 0:
            raise ConfigError.mismatch("multiplier_init", "a number >= 0", f"{initial!r}")
        self.linear = nn.Parameter(torch.full((len(targets),), float(initial)))
        self.quadratic = nn.Parameter(torch.full((len(targets),), float(initial)))
        self.register_buffer("targets", torch.tensor(targets, dtype=torch.float32))

    def of(self, task_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Targets, λ1 and λ2 of each row of a batch, ``[B]`` each; ``task_id`` is int64 ``[B]``."""
        return self.targets[task_id], self.linear[task_id], self.quadratic[task_id]

    @torch.no_grad()
    def project(self) -> None:
        """Back to ``λ >= 0``."""
        for parameter in self.parameters():
            parameter.clamp_(min=0)
