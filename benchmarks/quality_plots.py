"""Two pictures: quality against Ω, and which layers are full attention for which task."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from fluxcompile.errors import FluxError
from fluxcompile.evaluation import Results
from fluxcompile.evaluation.compare import omega, quality, relative, retrieval_and_loss
from fluxcompile.evaluation.intervals import Estimate
from quality_contenders import RouterRun, Run
from quality_static import METHODS

FULL = ("*", "black")
STATIC = ("o", "s", "^", "v", "P", "X", "<", ">")
ROUTER = "D"
PANEL = (5.2, 4.2)  # inches


def require_matplotlib() -> None:
    """Raises FluxError with the command that installs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FluxError(
            'plots: expected matplotlib (pip install "fluxcompile[bench]", or --no-plots), got none'
        )


def pareto(runs: Sequence[Run], seed: int, file: Path) -> None:
    """Overall quality, retrieval and holistic loss, each against the Ω of the same prompts."""
    from matplotlib.figure import Figure

    full = runs[0].results
    retrieval, loss = retrieval_and_loss(full).values()
    panels = [("share of full attention's quality", "Ω, mixture", list(full), None)]
    if retrieval:
        panels.append(("retrieval accuracy / full", "Ω, retrieval", retrieval, retrieval))
    if loss:
        panels.append(("code and prose loss / full", "Ω, code and prose", loss, loss))
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    runs = _near(runs)
    styles = _styles(runs)
    for axes, (title, label, cells, compared) in zip(all_axes, panels, strict=True):
        for run in runs:
            if compared is None:
                found = quality(run.results, full, seed=seed)
            else:
                found = relative(run.results, full, compared, seed=seed)
            _point(axes, _series(run), styles, omega(run.results, cells), found)
        axes.set(title=title, xlabel=label, xlim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    handles, labels = all_axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=150)


def _near(runs: Sequence[Run]) -> list[Run]:
    """Without what is sparse in every layer, if there is more: so far off, it hides the others."""
    near = [run for run in runs if any(result.full.any() for result in run.results.values())]
    return near if len(near) > 1 else list(runs)


def _series(run: Run) -> str:
    """What shares a mark: a recipe's seeds, a method's patterns of one kind of sparse attention."""
    if isinstance(run, RouterRun):
        return run.source.recipe
    method = run.name.split()[0]
    if method not in METHODS:
        return run.name
    several = run.name.endswith(f" {run.sparse}")  # the name then says which
    return f"{method} {run.sparse}" if several else method


def _styles(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Mark and colour of every series; routers are filled in colours, patterns are grey."""
    routers = dict.fromkeys(_series(run) for run in runs if isinstance(run, RouterRun))
    statics = dict.fromkeys(_series(run) for run in runs[1:] if not isinstance(run, RouterRun))
    styles = {runs[0].name: FULL}
    styles |= {name: (STATIC[i % len(STATIC)], "dimgray") for i, name in enumerate(statics)}
    return styles | {name: (ROUTER, f"C{i % 10}") for i, name in enumerate(routers)}


def _point(axes, series: str, styles: dict, share: float, found: Estimate) -> None:
    mark, colour = styles[series]
    spread = [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]
    axes.errorbar(
        share, found.value, yerr=spread, fmt=mark, color=colour, label=series, capsize=2,
        markersize=6, elinewidth=0.8, alpha=0.85, fillstyle="none" if mark in STATIC else "full",
        zorder=2 if mark in STATIC else 3,
    )  # fmt: skip


def route_map(runs: Sequence[Run], file: Path) -> None:
    """Share of prompts in full attention, layers by tasks, a panel a router (or static pattern)."""
    from matplotlib.figure import Figure

    shown = [run for run in runs if isinstance(run, RouterRun)] or list(runs[1:])
    tasks = list(dict.fromkeys(cell.task for cell in runs[0].results))
    figure = Figure(figsize=(3.2 * max(len(shown), 1) + 1, 6.4), layout="constrained")
    all_axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, run in zip(all_axes, shown, strict=True):
        share = torch.stack([_share(run.results, task) for task in tasks], dim=1)
        image = axes.imshow(share, aspect="auto", vmin=0, vmax=1, cmap="magma_r")
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", fontsize=8)
        axes.set_title(f"{run.name}, Ω {omega(run.results):.2f}", fontsize=9)
    all_axes[0].set_ylabel("layer")
    all_axes[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(all_axes), label="share of prompts in full attention")
    figure.savefig(file, dpi=150)


def _share(results: Results, task: str) -> torch.Tensor:
    """fp64 ``[L]``, over all lengths."""
    rows = [result.full for cell, result in results.items() if cell.task == task]
    return torch.cat(rows).double().mean(dim=0)
