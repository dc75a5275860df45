"""The layers of a report in one order, which every picture and the table share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fluxcompile.explaining.prompt import PromptReport
from fluxcompile.passes.site import CacheKind
from fluxcompile.report import AttentionReport


@dataclass(frozen=True)
class LayerOnPage:
    """What is known of one attention.

    Attributes:
        index: position on the page.
        row: its line in the report.
        routes: for each row of the batch whether it took full attention; None if nobody knows.
        routed, full: seconds on the routes taken and pinned to full; None if not measured.
        kept, untrimmed: bytes of its keys and values now, and had all been kept; None if not known.
    """

    index: int
    row: AttentionReport
    routes: tuple[bool, ...] | None
    routed: float | None
    full: float | None
    kept: int | None
    untrimmed: int | None


def layers_of(report: PromptReport) -> list[LayerOnPage]:
    """One entry a line of the report."""
    rows = report.layers.rows
    columns = _routes(report)
    times = report.times
    memory = _memory(report)
    return [
        LayerOnPage(
            index,
            row,
            columns.get(row.path),
            times.routed.get(row.path) if times else None,
            times.full.get(row.path) if times else None,
            *memory.get(index, (None, None)),
        )
        for index, row in enumerate(rows)
    ]


def _routes(report: PromptReport) -> dict[str, tuple[bool, ...]]:
    if report.routes is None:
        return {}
    columns = report.routes.fa.t().tolist()
    return {
        name: tuple(column) for name, column in zip(report.routes.layer_names, columns, strict=True)
    }


def _memory(report: PromptReport) -> dict[int, tuple[int, int]]:
    """Line of the report -> bytes. A cache counts layers; a line says its layer in its path."""
    if report.memory is None:
        return {}
    rows, layers = report.layers.rows, len(report.memory.layers)
    own = [_number(row.path) for row in rows]
    if len(rows) == layers and len({*own} - {None}) != layers:
        own = list(range(layers))  # paths without numbers of their own: in the order they ran
    return {
        index: (report.memory.layers[layer], report.memory.untrimmed[layer])
        for index, (layer, row) in enumerate(zip(own, rows, strict=True))
        if layer is not None and layer < layers and row.cache != CacheKind.NONE.value
    }


def _number(path: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{path}.")
    return int(found.group(1)) if found else None
