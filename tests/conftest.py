"""Shared set-up: one thread a process, GPU and slow tests skipped where they do not belong."""

import os

# Before torch is imported: workers of pytest-xdist would otherwise fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sys

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the full matrix too")
    parser.addoption("--fuzz-minutes", type=float, default=0, help="minutes for each fuzzer")
    parser.addoption("--fuzz-seed", type=int, help="where the fuzzers start")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    not_asked = pytest.mark.skip(reason="full matrix: run with --slow")
    slow_wanted = config.getoption("--slow") or "slow" in (config.option.markexpr or "")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not slow_wanted:
            item.add_marker(not_asked)


def pytest_collection_finish() -> None:
    """Less work for Dynamo: nearly all of the suite's time is its tracing."""
    # What the imports made stays: walking it again and again finds nothing.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if "torch._dynamo" in sys.modules:  # no report, for a log, of what a frame changes
        torch._dynamo.config.side_effect_replay_policy = "silent"


@pytest.fixture(autouse=True)
def fresh_state():
    """Same seed for every test, and no compiled code left behind for the next one."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def lowered(monkeypatch) -> list:
    """One entry a graph that the backend lowers: its compilations are counted by these."""
    from fluxcompile import backend

    graphs, lower = [], backend.lower

    def counting(gm, inputs, options):
        graphs.append(gm)
        return lower(gm, inputs, options)

    monkeypatch.setattr(backend, "lower", counting)
    return graphs
