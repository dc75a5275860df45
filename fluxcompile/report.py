"""``FluxReport``: one row an attention, what it became or why it was left alone."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fluxcompile.passes.pipeline import Rewrite
from fluxcompile.passes.site import AttentionSite, SkipReason
from fluxcompile.planning import Planner


@dataclass(frozen=True)
class AttentionReport:
    """One attention layer of one graph.

    Attributes:
        path: module path.
        query_shape: ``(B, H, Sq, D)``; key_shape: ``(B, HK, Skv, D)`` before expansion. Symbolic
            sizes stay symbolic.
        mask: the mask found, in words; cache: where keys come from.
        became: what it was rewritten to, or "left alone".
        reason: the typed reason it was left alone or not routed, or None.
        detail: what was seen.
        notes: what else was done to it.
    """

    path: str
    query_shape: tuple
    key_shape: tuple
    mask: str
    cache: str
    became: str
    reason: SkipReason | None
    detail: str
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Reason and notes in words."""
        reason = f"{self.reason.value}: {self.detail}".rstrip(": ") if self.reason else ""
        return "; ".join(filter(None, (reason, *self.notes)))

    @classmethod
    def of(cls, site: AttentionSite, name: str) -> AttentionReport:
        why = site.skip or site.not_routed
        return cls(
            path=name,
            query_shape=site.q_shape,
            key_shape=site.k_shape,
            mask=str(site.mask) if site.mask is not None else "unread",
            cache=site.cache.value,
            became=site.became,
            reason=why.reason if why else None,
            detail=why.detail if why else "",
            notes=tuple(site.notes),
        )


@dataclass(frozen=True)
class GraphReport:
    """The attentions of one compiled graph, and the seconds its passes took."""

    rows: tuple[AttentionReport, ...]
    seconds: float

    @classmethod
    def of(cls, result: Rewrite, planner: Planner) -> GraphReport:
        rows = tuple(AttentionReport.of(s, planner.layer_name(s)) for s in result.sites)
        return cls(rows, sum(result.seconds.values()))


@dataclass(frozen=True)
class FluxReport:
    """All graphs of one call; prints as a table. ``rows`` joins them."""

    graphs: tuple[GraphReport, ...]

    @property
    def rows(self) -> tuple[AttentionReport, ...]:
        return tuple(row for graph in self.graphs for row in graph.rows)

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.rows)} attention layers")
        for heading in ("layer", "query", "key", "mask", "cache", "became", "why"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            shapes = (" ".join(map(str, shape)) for shape in (row.query_shape, row.key_shape))
            table.add_row(row.path, *shapes, row.mask, row.cache, row.became, row.why)
        return table

    def __str__(self) -> str:
        console = Console(width=160, record=True, file=_Nowhere())
        console.print(self)
        return console.export_text().rstrip()


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
