"""What the logs say of each task: losses and sparsity; and of the run: speed and memory."""

import resource
import sys
import time
from collections.abc import Sequence

import torch

from fluxcompile.training.processes import gathered, summed


class Statistics:
    """Sums over the rows seen since the last report, kept on the device until then.

    Args:
        tasks: names, in the order of ``task_id``.
        columns: names of the outputs to average, ``lm_loss`` first.
        device: of the batches.
    """

    def __init__(self, tasks: Sequence[str], columns: Sequence[str], device: torch.device) -> None:
        self.tasks = tuple(tasks)
        self.columns = tuple(columns)
        # Of each task: the columns' sums and the rows; last, the tokens, in the first column.
        self._sums = torch.zeros(
            len(tasks) + 1, len(columns) + 1, dtype=torch.float64, device=device
        )
        self._since = time.perf_counter()

    def add(
        self, outputs: dict[str, torch.Tensor], task_id: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """Count one batch: a trainee's outputs, int64 ``[B]``, and its mask ``[B, S]``."""
        columns = [outputs[name].double() for name in self.columns]
        rows = torch.stack([*columns, torch.ones_like(columns[0])], dim=1)
        self._sums.index_add_(0, task_id, rows)
        self._sums[-1, 0] += mask.sum()

    def report(self) -> dict[str, float]:
        """Means since the last report, over every process; starts the next span.

        Tasks without a row are left out.
        """
        sums = summed(self._sums).cpu()
        values: dict[str, float] = {}
        rows = sums[:-1, -1]
        if rows.sum():
            values["lm_loss"] = float(sums[:-1, 0].sum() / rows.sum())
        for i_task, task in enumerate(self.tasks):
            if not rows[i_task]:
                continue
            for i_column, column in enumerate(self.columns):
                values[f"{column}/{task}"] = float(sums[i_task, i_column] / rows[i_task])
        now = time.perf_counter()
        values["tokens_per_second"] = float(sums[-1, 0]) / (now - self._since)
        values["peak_memory_gib"] = max(gathered(_peak_memory(self._sums.device))) / 2**30
        self._sums.zero_()
        self._since = now
        return values


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU since the last call; of the process since it began on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
