"""Around each optimiser step: stop on numbers that are none, clip the gradient."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from fluxcompile.errors import TrainingError
from fluxcompile.training.processes import gathered, summed


class Safeguard(TrainerCallback):
    """Checks of every step, the same on every process.

    Args:
        parameters: whose gradient is checked and clipped.
        tasks: names, in the order of ``task_id``.
        max_grad_norm: the gradient is scaled down to this norm; 0 clips nothing.
        after_step: called after each optimiser step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        tasks: Sequence[str],
        max_grad_norm: float,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.tasks = tuple(tasks)
        self.max_grad_norm = max_grad_norm
        self.after_step = after_step
        self.grad_norm = 0.0
        self._rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def remember(self, losses: torch.Tensor, task_id: torch.Tensor, index: torch.Tensor) -> None:
        """Keep the rows of one batch, ``[B]`` each, until the step."""
        self._rows.append((losses, task_id, index))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clip the gradient.

        Raises:
            TrainingError: a loss or gradient of this step is NaN or infinite. What is trained is
                as the last step left it.
        """
        parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        limit = self.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        losses = torch.stack([loss.sum() for loss, _, _ in self._rows]).sum()
        # One flag for all: processes that disagree about stopping would wait for each other.
        wrong = summed((~torch.isfinite(norm + losses)).to(torch.int64))
        if wrong:
            self._stop(state.global_step)
        self.grad_norm = float(norm)
        self._rows.clear()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_step is not None:
            self.after_step()

    def _stop(self, step: int) -> None:
        rows = [
            (self.tasks[task], index, loss)
            for losses, tasks, indices in self._rows
            for task, index, loss in zip(
                tasks.tolist(), indices.tolist(), losses.tolist(), strict=True
            )
        ]
        everywhere = [row for part in gathered(rows) for row in part]
        bad = [row for row in everywhere if not math.isfinite(row[2])]
        kind = "loss" if bad else "gradient"
        named = ", ".join(f"{index} ({task})" for task, index, _ in bad or everywhere)
        raise TrainingError(
            f"step {step}: expected a finite {kind}, got NaN or infinity; examples: {named}. The "
            "weights and the last checkpoint are as they were before this step"
        )
