"""Every cell's prompts through one engine, in batches of one size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fluxcompile.errors import DataError, FluxError
from fluxcompile.evaluation.intervals import Estimate, mean, wilson
from fluxcompile.evaluation.prompts import Cell, Cells, Prompt
from fluxcompile.evaluation.scoring import Scores

Engine = Callable[[Sequence[Prompt]], Scores]


@dataclass(frozen=True, eq=False)
class CellResult:
    """What N prompts of a cell scored.

    Attributes:
        cell: which one.
        loss: fp64 ``[N]``, nats a target token. exact: bool ``[N]``.
        full: bool ``[N, L]``, True for full attention.
    """

    cell: Cell
    loss: torch.Tensor
    exact: torch.Tensor
    full: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        """What the cell's metric judges, fp64 ``[N]``: 1 for a right answer, or the loss."""
        return self.exact.double() if self.cell.metric == "accuracy" else self.loss

    @property
    def omega(self) -> torch.Tensor:
        """Share of layers on sparse attention, fp64 ``[N]``."""
        return (~self.full).double().mean(dim=1)

    def estimate(self, seed: int = 0) -> Estimate:
        """Mean of :attr:`values` with a 95% interval."""
        if self.cell.metric == "accuracy":
            return wilson(int(self.exact.sum()), len(self.exact))
        return mean(self.loss, seed=seed)


Results = dict[Cell, CellResult]


def evaluate(
    engine: Engine,
    cells: Cells,
    batch: int = 8,
    on_prompts: Callable[[int], object] | None = None,
) -> Results:
    """Score every prompt.

    Args:
        engine: scores a batch; every one is given ``batch`` prompts, the last ones of a cell
            again where they do not suffice, so that no other batch size is compiled.
        cells: prompts of each cell.
        batch: prompts a call.
        on_prompts: called with the number of prompts that are done anew.

    Raises:
        DataError: ``batch`` is below 1, or a cell has no prompts.
        FluxError: a loss is not a number, whose prompt would be judged all the same.
    """
    if batch < 1:
        raise DataError.mismatch("batch", "at least 1", batch)
    results = {}
    for cell, prompts in cells.items():
        if not prompts:
            raise DataError.mismatch(f"prompts of {cell.task} at {cell.length}", "some", "none")
        scores = []
        for start in range(0, len(prompts), batch):
            chosen = list(prompts[start : start + batch])
            full_batch = chosen + chosen[-1:] * (batch - len(chosen))
            found = engine(full_batch)
            scores.append(Scores(*(column[: len(chosen)] for column in found)))
            if on_prompts is not None:
                on_prompts(len(chosen))
        result = CellResult(cell, *(torch.cat(column) for column in zip(*scores, strict=True)))
        if undefined := result.loss.isnan().nonzero().flatten().tolist():
            which = f"loss of prompts {undefined[:8]} of {cell.task} at {cell.length}"
            raise FluxError.mismatch(which, "a number", "nan")
        results[cell] = result
    return results
