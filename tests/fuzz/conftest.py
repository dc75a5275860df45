"""A campaign for each fuzzer, and what it says at the end."""

import secrets

import pytest

from tests.fuzz.campaign import Campaign


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    minutes = config.getoption("--fuzz-minutes")
    for item in items:
        if "campaign" in getattr(item, "fixturenames", ()) and minutes:
            item.add_marker(pytest.mark.timeout(60 * minutes + 600))


@pytest.fixture
def campaign(request, capsys):
    """The same examples every time, unless minutes or a seed are given."""
    minutes, seed = (request.config.getoption(f"--fuzz-{x}") for x in ("minutes", "seed"))
    if seed is None:
        seed = secrets.randbelow(10**6) if minutes else 0
    campaign = Campaign(minutes, seed)
    yield campaign
    if minutes:
        with capsys.disabled():
            print(f"\n{request.node.name}: {campaign}")
