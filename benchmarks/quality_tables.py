"""Rows for the terminal: one dict of text a row."""

from collections.abc import Sequence

from fluxcompile.evaluation.compare import (
    judged,
    omega,
    quality,
    relative,
    retrieval_and_loss,
)
from fluxcompile.evaluation.intervals import Estimate
from quality_contenders import Run
from quality_goals import Verdict

MET = {True: "met", False: "MISSED", None: "—"}


def score_rows(runs: Sequence[Run], length: int, seed: int) -> list[dict[str, str]]:
    """A contender a row, a task a column."""
    rows = []
    for run in runs:
        found = {cell: result for cell, result in run.results.items() if cell.length == length}
        scores = {cell.task: _text(result.estimate(seed)) for cell, result in found.items()}
        rows.append({"routes": run.name, "Ω": f"{omega(found):.2f}", **scores})
    return rows


def omega_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A contender a row; static patterns have one Ω, so only the first column says more."""
    rows = []
    for run in runs:
        cells = list(run.results)
        kinds = {
            kind: omega(run.results, [cell for cell in cells if cell.kind == kind])
            for kind in dict.fromkeys(cell.kind for cell in cells)
        }
        tasks = {
            task: omega(run.results, [cell for cell in cells if cell.task == task])
            for task in dict.fromkeys(cell.task for cell in cells)
        }
        shares = {"mixture": omega(run.results), **kinds, **tasks}
        rows.append({"routes": run.name, **{name: f"{x:.2f}" for name, x in shares.items()}})
    return rows


def summary_rows(runs: Sequence[Run], seed: int) -> list[dict[str, str]]:
    """A contender's sparse attention, what is left of full attention's quality, and its parts."""
    full = runs[0].results
    good = judged(full)
    retrieval, loss = retrieval_and_loss(full).values()
    groups = {
        "needle / full": [cell for cell in good if cell.task == "needle"],
        "retrieval / full": retrieval,
        "in-context / full": [cell for cell in good if cell.task == "in_context"],
        "loss / full": loss,
    }
    return [
        {
            "routes": run.name,
            "sparse": run.sparse or "—",
            "through": run.through,
            "Ω": f"{omega(run.results):.3f}",
            "quality": _text(quality(run.results, full, seed=seed), 3),
            **{
                name: _text(relative(run.results, full, cells, seed=seed), 3) if cells else "—"
                for name, cells in groups.items()
            },
            "seconds": f"{run.seconds:.0f}",
        }
        for run in runs
    ]


def goal_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """Every goal of every router, and of every recipe with several seeds how many met it."""
    rows = [
        {
            "router": verdict.router,
            "goal": verdict.goal,
            "found": "—" if verdict.found is None else _text(verdict.found, 3),
            "Ω": "—" if verdict.omega is None else f"{verdict.omega:.2f}",
            "": MET[verdict.met],
            "note": verdict.note,
        }
        for verdict in verdicts
    ]
    for recipe in dict.fromkeys(verdict.recipe for verdict in verdicts):
        ours = [verdict for verdict in verdicts if verdict.recipe == recipe]
        if len({verdict.router for verdict in ours}) == 1:
            continue
        for goal in dict.fromkeys(verdict.goal for verdict in ours):
            met = [verdict.met for verdict in ours if verdict.goal == goal]
            said = f"{met.count(True)} of {len(met)} seeds"
            word = MET[all(met)] if None not in met else MET[None]
            rows.append(
                {"router": f"{recipe}, seeds", "goal": goal, "found": said, "Ω": "", "": word,
                 "note": ""}
            )  # fmt: skip
    return rows


def _text(estimate: Estimate, digits: int = 2) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in estimate)
    return value if estimate.low != estimate.low else f"{value} ({low}–{high})"
