"""Results of one set of routes against those of full attention, and against other routes'.

Retrieval and holistic weigh alike, as in the mixture that routers are trained on, and within each
the cells do. All intervals are of a bootstrap over prompts, which the results share.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fluxcompile.errors import DataError
from fluxcompile.evaluation.evaluate import CellResult, Results
from fluxcompile.evaluation.intervals import Estimate, bootstrap
from fluxcompile.evaluation.prompts import Cell
from fluxcompile.training.objective import shortfall

#: of each prompt, fp64 ``[N]``
Measure = Callable[[CellResult], Tensor]

#: what full attention itself must get right of a cell, for a share of it to mean anything
LEAST_ACCURACY = 0.2


def metric(result: CellResult) -> Tensor:
    """What the cell's metric judges: right answers, or the loss."""
    return result.values


def certainty(result: CellResult) -> Tensor:
    """How probable the right answer is, a token, in the place of accuracy: a finer measure."""
    return 1 - shortfall(result.loss) if result.cell.metric == "accuracy" else result.values


def omega(results: Results, cells: Iterable[Cell] | None = None) -> float:
    """Mean Ω over cells; over all of them, retrieval and holistic weighing alike."""
    cells = list(results if cells is None else cells)
    weights = kind_weights(cells)
    means = torch.stack([results[cell].omega.mean() for cell in cells])
    return float(weights @ means)


def context_awareness(results: Results, length: int) -> float:
    """Ω of holistic prompts minus Ω of retrieval prompts, of ``length`` tokens both.

    Raises:
        DataError: there are no prompts of one kind.
    """
    found = {}
    for kind in ("holistic", "retrieval"):
        cells = [cell for cell in results if (cell.kind, cell.length) == (kind, length)]
        if not cells:
            raise DataError.mismatch(f"{kind} prompts of {length} tokens", "some", "none")
        found[kind] = omega(results, cells)
    return found["holistic"] - found["retrieval"]


def kind_weights(cells: Sequence[Cell]) -> Tensor:
    """Weight of each cell, fp64, 1 in all: kinds weigh alike, and within a kind its cells."""
    kinds = [cell.kind for cell in cells]
    return torch.tensor(
        [1 / (len(set(kinds)) * kinds.count(kind)) for kind in kinds], dtype=torch.float64
    )


def judged(full: Results) -> list[Cell]:
    """Cells that full attention is good enough at for others to be held against it."""
    return [
        cell
        for cell, result in full.items()
        if cell.metric == "loss" or float(result.values.mean()) >= LEAST_ACCURACY
    ]


def retrieval_and_loss(full: Results) -> dict[str, list[Cell]]:
    """The cells that are :func:`judged`, without in-context learning, by what is compared."""
    cells = judged(full)
    return {
        "retrieval": [cell for cell in cells if cell.kind == "retrieval"],
        "loss": [cell for cell in cells if cell.metric == "loss"],
    }


def relative(
    results: Results, full: Results, cells: Iterable[Cell], by: Measure = metric, **settings
) -> Estimate:
    """Mean over that of full attention, of cells of one metric taken together.

    Args:
        results, full: of the same prompts.
        cells: of one metric.
        by: what is measured of each prompt.
        settings: as :func:`bootstrap` takes them.

    Raises:
        DataError: no cells, or of several metrics.
    """
    cells = _of_one_metric(cells)

    def ratio(means: list[Tensor]) -> Tensor:
        ours, theirs = torch.stack(means).mean(dim=0).unbind(dim=-1)
        return ours / theirs

    return bootstrap(_columns(cells, results, full, by=by), ratio, **settings)


def relative_difference(
    ours: Results,
    theirs: Results,
    full: Results,
    cells: Iterable[Cell],
    by: Measure = metric,
    **settings,
) -> Estimate:
    """:func:`relative` of one minus that of another, prompt by prompt."""
    cells = _of_one_metric(cells)

    def difference(means: list[Tensor]) -> Tensor:
        first, second, whole = torch.stack(means).mean(dim=0).unbind(dim=-1)
        return (first - second) / whole

    return bootstrap(_columns(cells, ours, theirs, full, by=by), difference, **settings)


def quality(
    results: Results, full: Results, cells: Sequence[Cell] | None = None, **settings
) -> Estimate:
    """What is left of full attention's quality: 1 is all of it.

    Accuracy over full attention's, and full attention's loss over the loss, averaged over
    ``cells``; None for all that are :func:`judged`.
    """
    cells = judged(full) if cells is None else cells
    return bootstrap(_columns(cells, results, full), _quality(cells, 0), **settings)


def quality_difference(
    ours: Results,
    theirs: Results,
    full: Results,
    cells: Sequence[Cell] | None = None,
    by: Measure = metric,
    **settings,
) -> Estimate:
    """:func:`quality` of one minus that of another, prompt by prompt.

    Args:
        ours, theirs, full: of the same prompts.
        cells: None for all that are :func:`judged`.
        by: what is measured of each prompt.
        settings: as :func:`bootstrap` takes them.
    """
    cells = judged(full) if cells is None else cells
    first, second = _quality(cells, 0), _quality(cells, 1)
    columns = _columns(cells, ours, theirs, full, by=by)
    return bootstrap(columns, lambda means: first(means) - second(means), **settings)


def _of_one_metric(cells: Iterable[Cell]) -> list[Cell]:
    cells = list(cells)
    metrics = {cell.metric for cell in cells}
    if len(metrics) != 1:
        raise DataError.mismatch("cells", "some, of one metric", sorted(metrics) or "none")
    return cells


def _quality(cells: Sequence[Cell], column: int) -> Callable[[list[Tensor]], Tensor]:
    """Of the results in ``column``; those of full attention are in the last one."""
    weights = kind_weights(cells)

    def of(means: list[Tensor]) -> Tensor:
        shares = [
            mean[:, column] / mean[:, -1]
            if cell.metric == "accuracy"
            else mean[:, -1] / mean[:, column]
            for cell, mean in zip(cells, means, strict=True)
        ]
        return torch.stack(shares, dim=-1) @ weights

    return of


def _columns(cells: Sequence[Cell], *results: Results, by: Measure = metric) -> list[Tensor]:
    """What is measured of each cell's prompts, ``[N, results]``."""
    return [torch.stack([by(one[cell]) for one in results], dim=1) for cell in cells]
