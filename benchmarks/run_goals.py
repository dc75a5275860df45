"""What the compiler is held to on Llama-3.1-8B's shape, and whether it gets there."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from run_results import Results, at_once

Row = dict[str, Any]
K = 1024
FLOOR_AIM = 1.15  # times the floor


@dataclass(frozen=True)
class Verdict:
    """One goal.

    Attributes:
        goal: what is compared with what.
        must, aim: the bounds, as text; empty where there is none.
        found: the value, as text; "—" where rows are missing.
        value: the same as a number.
        met_must, met_aim: None where there is no bound or nothing to judge.
        note: which rows were taken.
    """

    goal: str
    must: str
    aim: str
    found: str
    value: float | None
    met_must: bool | None
    met_aim: bool | None
    note: str = ""


@dataclass(frozen=True)
class Bound:
    """``value`` at least or at most."""

    value: float
    at_least: bool = False

    def holds(self, found: float) -> bool:
        return found >= self.value if self.at_least else found <= self.value

    def text(self, form: Callable[[float], str]) -> str:
        return f"{'≥' if self.at_least else '≤'} {form(self.value)}"


def times(value: float) -> str:
    return f"{value:.2f}×"


def milliseconds(value: float) -> str:
    return f"{value:.2f} ms"


def percent(value: float) -> str:
    return f"{value:+.2%}"


def goals(results: Results) -> list[Verdict]:
    """Every goal, met or not or not judged."""
    return [*_prefill(results), *_decode(results), *_routers(results), *_rest(results)]


def judge(
    goal: str,
    form: Callable[[float], str],
    rows: Sequence[Row | None],
    value: Callable[..., float],
    must: Bound | None = None,
    aim: Bound | None = None,
    note: str = "",
) -> Verdict:
    """``value(*rows)`` against the bounds; not judged while a row is missing."""
    texts = [bound.text(form) if bound else "" for bound in (must, aim)]
    if any(row is None for row in rows):
        return Verdict(goal, *texts, "—", None, None, None, "not run")
    found = value(*rows)
    met = [bound.holds(found) if bound else None for bound in (must, aim)]
    notes = [note] if note else []
    if len({row["run"] for row in rows}) > 1:
        notes.append("rows of several runs")
    if (beside := max(map(at_once, rows))) > 1:
        notes.append(f"{beside} parts at once")
    return Verdict(goal, *texts, form(found), found, *met, "; ".join(notes))


def at_least(value: float) -> Bound:
    return Bound(value, at_least=True)


def _of_floor(row: Row) -> float:
    return row["median"] / row["floor"]


def _faster(row: Row, *others: Row) -> float:
    return min(other["median"] for other in others) / row["median"]


def _prefill(results: Results) -> list[Verdict]:
    def row(kilo: int, peer: str) -> Row | None:
        return results.row(f"prefill-{kilo}k", f"{kilo * K} tokens: {peer}")

    found = []
    for kilo, omega, must, aim in ((128, 0.5, 1.75, 1.9), (128, 0.75, 2.3, 2.7), (256, 0.75, 3, 4)):
        peer, what = f"flux Ω={omega:.2f}", f"prefill {kilo}K, Ω={omega}"
        rows = row(kilo, peer), row(kilo, "eager")
        found.append(judge(f"{what}, against eager", times, rows, _faster,
                           at_least(must), at_least(aim)))  # fmt: skip
        if kilo == 128:
            found.append(judge(f"{what}, of the floor", times, rows[:1], _of_floor,
                               aim=Bound(FLOOR_AIM)))  # fmt: skip
    for kilo, must in ((8, 1.0), (32, 1.08)):
        rows = row(kilo, "flux"), row(kilo, "eager"), row(kilo, "inductor")
        goal = f"prefill {kilo}K, Ω=0, against the better of eager and Inductor"
        found.append(judge(goal, times, rows, _faster, at_least(must), at_least(1.15)))
    return found


def _decode(results: Results) -> list[Verdict]:
    def best(kilo: int, omega: float, batch: int = 1, routes: str = "static") -> Row | None:
        """The fastest of flux, whatever cache it has, with CUDA graphs or without."""
        part = f"decode-{kilo}k" if batch == 1 else f"decode-b{batch}"
        rows = [
            row
            for row in results.rows_of(part)
            if (row["compiler"], row["routes"], row["omega"]) == ("flux", routes, omega)
            and row["length"] == kilo * K
        ]
        return min(rows, key=lambda row: row["median"], default=None)

    def graphs(kilo: int) -> Row | None:
        name = f"KV {kilo * K}, batch 1: inductor + graphs, static cache"
        return results.row(f"decode-{kilo}k", name)

    def verdict(goal: str, form: Callable, row: Row | None, *rest, **bounds) -> Verdict:
        note = "" if row is None else row["name"].split(": ", 1)[1]
        return judge(goal, form, (row, *rest), bounds.pop("value"), note=note, **bounds)

    found = []
    for omega, must in ((0.0, 10), (0.5, 8), (0.75, 6.5)):
        row, what = best(128, omega), f"decode at 128K, Ω={omega:g}"
        found.append(verdict(f"{what}, a token", milliseconds, row, must=Bound(must),
                             value=lambda row: 1000 * row["median"]))  # fmt: skip
        found.append(verdict(f"{what}, of the floor", times, row, aim=Bound(FLOOR_AIM),
                             value=_of_floor))  # fmt: skip
    plain = "against Inductor + CUDA graphs"
    found += [
        verdict(f"decode at 128K, Ω=0.5, {plain}", times, best(128, 0.5), graphs(128),
                value=_faster, must=at_least(6), aim=at_least(8)),
        verdict(f"decode at 8K, Ω=0, {plain}", times, best(8, 0.0), graphs(8),
                value=_faster, must=at_least(1.5)),
        verdict("decode at 8K, Ω=0, of the floor", times, best(8, 0.0), value=_of_floor,
                aim=Bound(FLOOR_AIM)),
    ]  # fmt: skip
    for routes in ("static", "mixed"):
        rows = {"static": "rows alike", "mixed": "rows routed differently"}[routes]
        goal = f"decode, batch 8, 32K, Ω=0.5, {rows}, of the floor"
        found.append(verdict(goal, times, best(32, 0.5, 8, routes), value=_of_floor,
                             must=Bound(1.35), aim=Bound(FLOOR_AIM)))  # fmt: skip
    return found


def _routers(results: Results) -> list[Verdict]:
    whats = (("prefill {}K", "routers-{}k"), ("decode at {}K", "decode-routers-{}k"))
    return [
        _router_cost(results.rows_of(part.format(kilo)), what.format(kilo))
        for what, part in whats
        for kilo in (32, 128)
    ]


def _router_cost(rows: Sequence[Row], what: str) -> Verdict:
    """Of rows of pairs alone: older records of decode steps have others."""
    rows = [row for row in rows if "added" in row]
    note = "worst of Ω " + ", ".join(f"{row['omega']:g}" for row in rows)
    # Without graphs the host bounds a step, by more from one to the next than routers could add.
    if all(row.get("graphs") for row in rows):
        note += ", with CUDA graphs"
    return judge(
        f"routers against the same fixed routes, {what}", percent, rows or [None],
        lambda *rows: max(statistics.median(row["added"]) / row["static"] for row in rows),
        must=Bound(0.01), aim=Bound(0.003), note=note,
    )  # fmt: skip


def _rest(results: Results) -> list[Verdict]:
    memory = results.row("memory-128k", f"{128 * K} tokens: flux, flux-growing cache, Ω=0.75")
    inductor = results.row("compile", "inductor")
    found = [
        judge("KV bytes at 128K, Ω=0.75, of all tokens'", times, [memory],
              lambda row: row["share"], must=Bound(0.28)),
        judge("KV bytes at 128K, Ω=0.75, of those by arithmetic", lambda x: f"{x:.6f}×", [memory],
              lambda row: row["kv_bytes"] / row["expected_bytes"], aim=Bound(1.0)),
    ]  # fmt: skip
    for name, bounds in (
        ("flux", {"must": Bound(1.1)}),
        ("flux regional", {"aim": Bound(0.4)}),
    ):
        row = results.row("compile", name)
        found.append(judge(f"cold compile, {name}, against plain Inductor", times, [row, inductor],
                           lambda row, plain: row["cold"]["compile"] / plain["cold"]["compile"],
                           **bounds))  # fmt: skip
        found.append(judge(f"second process, {name}, of cold", times, [row],
                           lambda row: row["second"]["compile"] / row["cold"]["compile"],
                           Bound(0.5), Bound(0.25)))  # fmt: skip
    rows = [
        results.row("smollm2-8k", f"{8 * K} tokens: {peer}") for peer in ("flux Ω=0.75", "eager")
    ]
    found.append(judge("CPU, SmolLM2 prefill 8K, Ω=0.75, against eager", times, rows, _faster,
                       at_least(1.3), at_least(1.6), note=_cores(results)))  # fmt: skip
    return found


def _cores(results: Results) -> str:
    threads = results.records.get("smollm2-8k", {}).get("environment", {}).get("threads")
    return "" if threads is None else f"{threads} threads"
