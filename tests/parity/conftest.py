"""Compiling again without end fails a parity test instead of quietly running eager."""

import pytest
import torch


@pytest.fixture(autouse=True)
def loud_recompile_limit(fresh_state):
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    """The backend warns once a reason and process; each test sees its own."""
    monkeypatch.setattr("fluxcompile.backend._warned", set())
