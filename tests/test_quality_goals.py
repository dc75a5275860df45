"""Verdicts of `benchmarks/quality_goals.py` on results that were written down by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fluxcompile
from fluxcompile.evaluation import Cell, CellResult

FOLDER = Path(__file__).parents[1] / "benchmarks"
NEEDLE, CODE = Cell("needle", 4096), Cell("code", 4096)
CONFIG = fluxcompile.FluxConfig()


@pytest.fixture
def judged(monkeypatch):
    """Goals by their first word, for a router and patterns given as :func:`results` takes them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from quality_contenders import RouterRun, Run, StaticRun
    from quality_goals import goals

    def judge(router, **patterns):
        about = CONFIG, "graph", 1.0
        config, *rest = about
        source = SimpleNamespace(name="mine", recipe="mine")
        runs = [
            Run("full", config, results(right=100, loss=2.0, sparse=(0, 0)), *rest),
            RouterRun("mine", config, results(**router), *rest, source=source),
            *(
                StaticRun(name, config, results(**found), *rest, routes=(1, 1, 0, 0))
                for name, found in patterns.items()
            ),
        ]
        return {verdict.goal.split()[0]: verdict for verdict in goals(runs, seed=0)}

    return judge


SURE, UNSURE = 0.0, 2.0  # loss of an answer


def results(right: int, loss: float, sparse=(2, 2)):
    """Of 100 needles so many found, code at a loss; of four layers so many sparse in each."""
    exact = torch.arange(100) < right
    losses = torch.where(exact, SURE, UNSURE), torch.full((100,), loss)
    made = {}
    for cell, values, count in zip((NEEDLE, CODE), losses, sparse, strict=True):
        full = (torch.arange(4) >= count).expand(100, 4)
        found = exact if cell is NEEDLE else torch.zeros(100, dtype=torch.bool)
        made[cell] = CellResult(cell, values.double(), found, full)
    return made


def test_retrieval_is_held_against_the_pattern_that_keeps_most_of_it(judged):
    patterns = {
        "cheap": {"right": 70, "loss": 2.0},
        "finder": {"right": 85, "loss": 2.5},
    }
    found = judged({"right": 99, "loss": 2.1, "sparse": (1, 3)}, **patterns)
    retrieval, quality = found["retrieval"], found["quality"]
    surer = 0.14 * (1 - math.exp(-UNSURE))
    assert retrieval.found.value == pytest.approx(surer)
    assert retrieval.met
    note = f"finder, Ω 0.50, probability {surer:+.3f}, accuracy +0.140, loss -0.200"
    assert retrieval.note == note
    assert quality.note.startswith("cheap, Ω 0.50, probability")
    gained = 0.29 * (1 - math.exp(-UNSURE)) / 2 - (1 - 2 / 2.1) / 2
    assert quality.found.value == pytest.approx(gained)
    assert quality.met
    worse = judged({"right": 85, "loss": 2.1, "sparse": (1, 3)}, **patterns)
    assert not worse["retrieval"].met, "no more than one of them"


def test_without_a_pattern_of_equal_share_nothing_is_judged(judged):
    found = judged({"right": 99, "loss": 2.1, "sparse": (3, 3)}, other={"right": 70, "loss": 2.0})
    assert found["retrieval"].met is None
    assert "3 sparse layers" in found["retrieval"].note
