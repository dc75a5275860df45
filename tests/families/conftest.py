"""As in the parity tests: endless recompilation fails, and each test sees its own warnings."""

import pytest

from tests.parity.conftest import fresh_warnings, loud_recompile_limit  # noqa: F401


@pytest.fixture(autouse=True)
def told_to_the_table(request, record_property):
    """Which cell of docs/models.md a test fills."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "family" in parameters:
        cell = _COLUMN[request.node.originalname](parameters)
        record_property("cell", (parameters["family"].name, cell))


_COLUMN = {
    "test_rows_route_by_themselves": lambda _: "routed",
    "test_forced": lambda _: "routed",
    "test_explain": lambda _: "explained",
    "test_pinned": lambda p: _pinned(p["case"].pattern, p["case"].static),
}


def _pinned(pattern: tuple[int, int], static: bool) -> str:
    if static:
        return "static cache"
    return {(1, 1): "full", (0, 0): "sparse"}.get(pattern, "mixed")
