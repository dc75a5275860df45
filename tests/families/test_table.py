"""The committed page is about the families of the matrix."""

from tests.families.families import FAMILIES, LEFT_ALONE
from tests.families.table import COLUMNS, PAGE, Results, page


def rows(text: str) -> dict[str, list[str]]:
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells[1:]}


def test_the_page_lists_the_families_of_the_matrix():
    committed = rows(PAGE.read_text())
    assert list(committed) == [family.name for family in FAMILIES] + list(LEFT_ALONE)
    assert [row[0] for row in committed.values()] == [
        *(family.what for family in FAMILIES),
        *LEFT_ALONE.values(),
    ]
    assert not [name for name, row in committed.items() if "✗" in row]


def test_a_failed_test_shows_in_its_cell():
    class Report:
        when = "call"

        def __init__(self, cell, passed):
            self.passed, self.user_properties = passed, [("cell", cell)]

    results, name = Results(), FAMILIES[0].name
    for cell, passed in ((("full"), True), ("sparse", True), ("sparse", False), ("sparse", True)):
        results.pytest_runtest_logreport(Report((name, cell), passed))
    row = dict(zip(COLUMNS, rows(page(results))[name][1:], strict=True))
    assert (row["full"], row["sparse"], row["routed"]) == ("✓", "✗", "–")
