"""Two pictures: prefill and decode by length, a line a contender, the floors dashed."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_results import Results

Row = dict[str, Any]
GREY = {"eager": "black", "inductor": "dimgray", "inductor + graphs": "darkgray"}
SIZE = (9, 5)  # inches


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def prefill_plot(results: Results, file: Path) -> None:
    """Tokens a second against the prompt's length."""
    rows = [row for row in _of_one_shape(results, "prefill") if "floor" in row]
    rows = [row for row in rows if "chunks" not in row["peer"] and "router" not in row["peer"]]
    _plot(
        rows, file, "tokens in the prompt", "tokens a second",
        name=lambda row: row["peer"],
        value=lambda row, seconds: row["length"] / seconds,
    )  # fmt: skip


def decode_plot(results: Results, file: Path) -> None:
    """Milliseconds a token against the length of the cache, batch 1."""

    def name(row: Row) -> str:
        compiler = row["compiler"] + " + graphs" * row["graphs"]
        return compiler if row["compiler"] != "flux" else f"{compiler} Ω={row['omega']:.2f}"

    rows = [row for row in _of_one_shape(results, "decode") if row["batch"] == 1]
    rows = [row for row in rows if row["routes"] == "static"]
    best: dict[tuple, Row] = {}
    for row in rows:  # of several caches the fastest
        key = name(row), row["length"]
        if key not in best or row["median"] < best[key]["median"]:
            best[key] = row
    _plot(
        list(best.values()), file, "tokens in the cache", "ms a token, batch 1",
        name=name, value=lambda _, seconds: 1000 * seconds,
    )  # fmt: skip


def _of_one_shape(results: Results, script: str) -> list[Row]:
    """Of the first shape that has rows: other models' times are no points of the same lines."""
    for shape in ("llama-3.1-8b", "tiny"):
        if rows := results.rows(script, shape):
            return rows
    return []


def _plot(
    rows: list[Row],
    file: Path,
    x_label: str,
    y_label: str,
    name: Callable[[Row], str],
    value: Callable[[Row, float], float],
) -> None:
    from matplotlib.figure import Figure

    if not rows:
        return
    lines: dict[str, list[Row]] = defaultdict(list)
    points = {}
    for row in rows:  # of several parts the first
        points.setdefault((name(row), row["length"]), row)
    for (label, _), row in sorted(points.items(), key=lambda point: point[0][1]):
        lines[label].append(row)
    colours = {label: GREY.get(label) for label in lines}
    ours = [label for label in lines if label not in GREY]
    omegas = {label: lines[label][0].get("omega") or 0.0 for label in ours}
    by_omega = {omega: f"C{i}" for i, omega in enumerate(sorted(set(omegas.values())))}
    colours |= {label: by_omega[omegas[label]] for label in ours}
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        axes.plot(
            [row["length"] for row in line], [value(row, row["median"]) for row in line],
            marker="s" if "graphs" in label else "o", color=colours[label], label=label,
        )  # fmt: skip
    for omega, colour in by_omega.items():
        floors = {row["length"]: value(row, row["floor"]) for label in ours
                  if omegas[label] == omega for row in lines[label]}  # fmt: skip
        axes.plot(*zip(*sorted(floors.items()), strict=True), "--", color=colour, alpha=0.6,
                  label=f"floor Ω={omega:.2f}")  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=150)
