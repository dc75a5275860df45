"""Run the matrix of families and write docs/models.md from what the tests said.

    python tests/families/table.py [--output docs/models.md] [-- more arguments of pytest]

Half an hour on two cores: ``-- -n 2`` uses both.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
COLUMNS = ("full", "sparse", "mixed", "routed", "static cache", "explained")

_HEAD = """# Models

Written by `python tests/families/table.py` from the results of its tests. Each family is a tiny
random model, compiled without Inductor, fp32, on a CPU. A tick says that its logits were those of
an eager model whose attention is written out by its definition, in a prompt, in chunks and in
single tokens on a cache, below and above the sparse boundary.

| family | peculiar | full | sparse | a pattern | a router | static cache | `explain` |
|---|---|---|---|---|---|---|---|
"""
_TAIL = """
- *full*, *sparse*: all layers pinned to one route, rows padded on the left; *a pattern*: a sparse
  and a full layer, rows without padding.
- *a router*: it reads the query that the family has before rotary embedding, rows of a batch
  decide for themselves, and decode follows.
- *static cache*: sparse on a `StaticCache`, rows padded on the right. A tick in brackets: layers
  that slide run full attention on it, within their window, and say so.
- Layers with a sliding window of their own keep it, in full and in sparse attention.
- Cross-attention and attention that looks both ways are left alone, and `explain` says so.
"""
_LEFT_ALONE = "full attention, and a warning that says why"


class Results:
    """A pytest plugin: whether all tests of a cell passed."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], bool] = defaultdict(lambda: True)
        self.left_alone: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for name, value in report.user_properties:
            if name == "cell":
                self.cells[tuple(value)] &= report.passed
            elif name == "left alone" and report.passed:
                self.left_alone.add(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("pytest", nargs="*", help="more arguments of pytest")
    options = parser.parse_args()
    results = Results()
    code = pytest.main(
        [str(ROOT / "tests" / "families"), "-m", "families", "--slow", "-q", *options.pytest],
        plugins=[results],
    )
    options.output.write_text(page(results))
    return int(code)


def page(results: Results) -> str:
    sys.path.insert(0, str(ROOT))
    from tests.families.families import FAMILIES, LEFT_ALONE

    rows = []
    for family in FAMILIES:
        cells = [_cell(results, family, column) for column in COLUMNS]
        rows.append(" | ".join((f"| {family.name}", family.what, *cells)) + " |")
    for name, why in LEFT_ALONE.items():
        outcome = _LEFT_ALONE if name in results.left_alone else "✗"
        rows.append(" | ".join((f"| {name}", why, outcome, *[""] * (len(COLUMNS) - 1))) + " |")
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


def _cell(results: Results, family, column: str) -> str:
    key = (family.name, column)
    if key not in results.cells:
        return "–"
    if not results.cells[key]:
        return "✗"
    return "(✓)" if column == "static cache" and any(family.windows) else "✓"


if __name__ == "__main__":
    sys.exit(main())
