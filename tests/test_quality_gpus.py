"""Contenders spread over processes: the same numbers as in one, errors told, work kept."""

import functools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fluxcompile

FOLDER = Path(__file__).parents[1] / "benchmarks"
TWICE = functools.partial(functools.partial, operator.mul, 2)  # prepares: job -> 2 * job
INVERSE = functools.partial(functools.partial, operator.truediv, 1)
EXIT = functools.partial(functools.partial, os._exit)
VARIABLE = functools.partial(functools.partial, os.getenv)


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts' folder, for a test to import from."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if name.split("_")[0] == "quality"]:
        sys.modules.pop(name)
    for name in ("models", "common"):
        sys.modules.pop(name, None)


def quality(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    # A script finds its neighbours beside itself, unless this is set.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [
        sys.executable, str(FOLDER / "quality.py"), "--device", "cpu", "--tiny", "--no-plots",
        "--lowering", "eager", "--lengths", "1100", "--tasks", "needle", "code", "--examples", "2",
        "--batch", "2", "--search-length", "1100", "--search-examples", "1",
        "--output", str(output), *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def saved_router(folder: Path, first_layer: float, **config) -> Path:
    """One that routes its first layer sparse and its second full."""
    from quality_tiny import load_tiny

    model, _ = load_tiny("cpu", torch.float32)
    settings = fluxcompile.FluxConfig(sink=16, local=64, **config)
    router = fluxcompile.FluxRouter.from_model(model, settings)
    with torch.no_grad():
        router.layers[0].head[-1].bias.copy_(torch.tensor([first_layer, 0.0]))
    router.save_pretrained(folder)
    return folder


def timeless(record: dict) -> dict:
    for run in record["runs"]:
        run.pop("seconds")
    kept = ("runs", "goals", "two_compiles_of_full_attention_apart")
    return {name: record[name] for name in kept}


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes import everything
def test_two_processes_find_what_one_does_and_what_is_found_is_kept(benchmarks, tmp_path):
    routers = [
        "--router", f"first={saved_router(tmp_path / 'first', 4.0)}",
        "--router", f"end={saved_router(tmp_path / 'end', 3.0, prefix_size=0)}",
    ]  # fmt: skip
    records = []
    for name, more in (("one", ()), ("two", ("--gpus", "2"))):
        done = quality(tmp_path / name, *routers, *more)
        assert done.returncode == 0, done.stderr
        records.append(timeless(json.loads((tmp_path / name / "quality.json").read_text())))
    assert records[0] == records[1]
    assert [run["name"] for run in records[0]["runs"]] == [
        "full", "first", "end", "all sparse", "greedy 1/2", "greedy-retrieval 1/2",
        "exchanged 1/2", "exchanged-retrieval 1/2", "entropy 1/2", "random 1/2",
        "majority of first", "majority of end",
    ]  # fmt: skip
    # A contender is missing: it alone is run again.
    for file in (tmp_path / "two" / "partial").glob("first-*"):
        file.unlink()
    again = quality(tmp_path / "two", *routers, "--gpus", "2", "--resume")
    assert again.returncode == 0, again.stderr
    assert "all sparse: Ω 1.00, 4 prompts in" in again.stdout
    ran = [line for line in again.stdout.splitlines() if " prompts in " in line]
    assert [line.split(":")[0] for line in ran if "kept from before" not in line] == ["first"]
    assert timeless(json.loads((tmp_path / "two" / "quality.json").read_text())) == records[0]


@pytest.mark.parametrize("gpus", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_error_in_a_worker_is_told_and_leaves_no_record(tmp_path, gpus):
    methods = ("--methods", "entropy", "--sparse-layers", "1", "--search-length", "100")
    done = quality(tmp_path / "out", "--gpus", gpus, *methods)
    assert done.returncode == 1
    assert "error: " in done.stderr.splitlines()[-1]
    assert "got 100" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "quality.json").exists()


def test_jobs_are_spread_and_processes_end(benchmarks):
    from quality_pool import Spread

    with Spread(TWICE, [{}, {}]) as pool:
        assert dict(pool([1, 2, 3, 4, 5])) == {0: 2, 1: 4, 2: 6, 3: 8, 4: 10}
        assert dict(pool([7])) == {0: 14}, "the same processes again"
        processes = pool._processes
        assert len(processes) == 2
    assert all(process.exitcode is not None for process in processes)


def test_workers_have_environments_of_their_own(benchmarks):
    from quality_pool import Spread

    with Spread(VARIABLE, [{"CUDA_VISIBLE_DEVICES": "5"}]) as pool:
        assert dict(pool(["CUDA_VISIBLE_DEVICES"])) == {0: "5"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "5"


@pytest.mark.parametrize(
    ("prepare", "job", "said"),
    [
        (INVERSE, 0, "0, worker 0: ZeroDivisionError"),
        (EXIT, 3, "3, worker 0: expected a result, got exit code 3"),
        (functools.partial(operator.truediv, 1, 0), 1, "ZeroDivisionError"),
    ],
    ids=["raises", "dies", "cannot begin"],
)
def test_a_worker_that_fails_is_told(benchmarks, prepare, job, said):
    from quality_pool import Spread, WorkerError

    with Spread(prepare, [{}]) as pool, pytest.raises(WorkerError, match=said):
        list(pool([job]))


def test_too_few_gpus_are_told(benchmarks, monkeypatch):
    from fluxcompile.errors import OptionError
    from quality_run import environments

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [one["CUDA_VISIBLE_DEVICES"] for one in environments("cuda", 2)]
    assert found == ["0", "1"]
    with pytest.raises(OptionError, match="at most 2, got 3"):
        environments("cuda", 3)


def test_digests_see_every_token_and_weight(benchmarks):
    from fluxcompile.evaluation import Cell, Prompt
    from quality_partial import prompts_digest, weights_digest

    def of(*rows):
        return prompts_digest({Cell("code", 64): [Prompt(*row) for row in rows]})

    base = of(((1, 2), (3,)))
    assert of(((1, 2), (3,))) == base
    assert (
        len({base, of(((1,), (2, 3))), of(((1, 2), (4,))), of(((1, 2), (3,)), ((1,), (3,)))}) == 4
    )
    layer = torch.nn.Linear(3, 2)
    before = weights_digest(layer)
    assert weights_digest(layer) == before
    with torch.no_grad():
        layer.bias[1] += 1e-3
    assert weights_digest(layer) != before


def test_search_by_divergence_spares_the_layer_that_full_attention_needs(benchmarks):
    """Every way finds an order; the divergence of full attention from itself is 0."""
    import argparse

    from fluxcompile import FluxConfig
    from fluxcompile.evaluation import OneGraph
    from quality_search import Search
    from quality_tiny import load_tiny

    model, tokenizer = load_tiny("cpu", torch.float32)
    settings = {"tasks": ["needle"], "search_length": 1100, "search_examples": 3, "seed": 0,
                "style": "plain", "batch": 2}  # fmt: skip
    with OneGraph.of(model, FluxConfig(sink=16, local=64), lowering="eager") as graph:
        costs = {}
        for by in ("divergence", "loss", "likelihood"):
            search = Search(model, tokenizer, argparse.Namespace(**settings, search_by=by))
            assert sorted(search.greedy(graph, 2)) == [0, 1]
            batches = search._batches("retrieval")
            assert [batch.wanted for batch in batches] == [2, 1]
            assert search._batches("holistic") == []
            (sample,) = search._samples(graph, "retrieval")
            costs[by] = [float(sample(routes).mean()) for routes in ((1, 1), (0, 0))]
            (kept,) = search.exchanged(graph, (1, 0))
            others = {0: (0, 1), 1: (1, 0)}
            assert sample(others[kept]).mean() <= sample(others[1 - kept]).mean()
        engine = graph.pattern((0, 0))
        losses = torch.cat([engine(batch.prompts).loss[: batch.wanted] for batch in batches])
    assert costs["divergence"][0] == pytest.approx(0, abs=1e-6)
    assert costs["divergence"][1] > 1e-4
    assert costs["loss"][1] == pytest.approx(float(losses.mean()), rel=1e-5)
    likely = losses.neg().exp()
    assert 1 - costs["likelihood"][1] == pytest.approx(float(likely.mean()), rel=1e-5)
