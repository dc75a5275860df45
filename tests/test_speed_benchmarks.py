"""Benchmarks of decode, memory and compile time run, and measure what they say."""

import argparse
import importlib
import json

import pytest
import torch

import fluxcompile
from fluxcompile import runtime
from tests.scripts import FOLDER, forget_scripts

CONFIG = fluxcompile.FluxConfig(sink=64, local=256)


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import caches
    import checking
    import decode_contenders
    import decode_reference
    import models
    import record
    import routing

    modules = (models, caches, checking, record, routing, decode_reference, decode_contenders)
    yield argparse.Namespace(**{k: v for module in modules for k, v in vars(module).items()})
    forget_scripts()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in this process; returns its rows by their names without the setting."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def rows_of(script, *arguments):
        file = tmp_path / "record.json"
        main = importlib.import_module(script).main
        main(["--device", "cpu", "--tiny", "--lowering", "eager", "--json", str(file), *arguments])
        record = json.loads(file.read_text())
        assert record["complete"]
        assert {"date", "commit", "device", "torch"} <= record["environment"].keys()
        return {row["name"].split(": ", 1)[-1]: row for row in record["results"]}

    yield rows_of
    forget_scripts()


def test_decode_script_runs_on_a_cpu(run):
    rows = run(
        "decode", "--lengths", "600", "--batch", "2", "--steps", "2",
        "--sink", "64", "--local", "256", "--omega", "0.5", "--caches", "flux",
        "--routes", "static", "mixed", "--only", "eager, static|flux",
    )  # fmt: skip
    assert list(rows) == [
        "eager, static cache",
        "flux, flux cache, Ω=0.50, static",
        "flux, flux cache, Ω=0.50, mixed",
    ]
    full, sparse, mixed = rows.values()
    for row in rows.values():
        assert row["median"] > 0
        assert len(row["times"]) == 2
        assert row["error"] < 1e-5
        assert row["compiles"] == row["captures"] == 0
    assert sparse["floor"] == mixed["floor"] < full["floor"]


def test_routers_and_the_fixed_pattern_take_turns_on_one_cache(run, monkeypatch):
    taken = []
    incoming = runtime.CompiledGraph._incoming

    def noted(self, inputs):
        routes = incoming(self, inputs)
        if not self._io.decides:
            taken.append(routes.full.tolist())
        return routes

    monkeypatch.setattr(runtime.CompiledGraph, "_incoming", noted)
    rows = run(
        "decode", "--lengths", "600", "--steps", "2", "--router-pairs", "2", "--only", "routers",
        "--sink", "64", "--local", "256", "--omega", "0.5", "--caches", "flux", "static",
    )  # fmt: skip
    assert list(rows) == ["routers, flux cache, Ω=0.50", "routers, static cache, Ω=0.50"]
    for row in rows.values():
        assert (row["length"], row["batch"], row["omega"], row["graphs"]) == (600, 1, 0.5, False)
        assert row["static"] > 0
        assert len(row["added"]) == len(row["control"]) == 2
        assert row["compiles"] == row["captures"] == 0
        assert row["error"] < 1e-5
    # 3 steps are checked, 12 warm up, and 2 pairs have 2 routed blocks of 4 steps each.
    steps = 3 + 12 + 2 * 2 * 4
    trimmed, whole = [[True]], [[False, True]]  # a trimmed layer is routed no more
    assert taken == [trimmed] * steps + [whole] * steps


@torch.no_grad()
def test_the_reference_tells_routes_apart(parts):
    model = parts.random_model("tiny", None, "cpu", torch.float32)
    filling = parts.Filling(model, 2, 600)
    tokens = torch.tensor([[3, 4], [5, 6]])
    routes = torch.tensor([[1, 1], [1, 1]]), torch.tensor([[0, 1], [1, 1]])
    full, one = (parts.reference_logits(filling, CONFIG, x.bool(), tokens) for x in routes)
    assert torch.equal(full[:, 1], one[:, 1])
    bound = max(parts.ERROR_BOUND.values())
    for step in range(2):
        assert (full[step, 0] - one[step, 0]).norm() > 2 * bound * full[step, 0].norm()


@torch.no_grad()
def test_the_reference_is_full_attention_where_nothing_is_out_of_reach(parts):
    model = parts.random_model("tiny", None, "cpu", torch.float32)
    filling = parts.Filling(model, 1, 300)
    tokens = torch.tensor([[3], [4]])
    full, sparse = (
        parts.reference_logits(filling, CONFIG, torch.full((1, 2), x), tokens)
        for x in (True, False)
    )
    assert torch.equal(full, sparse)


def test_a_filling_is_the_same_every_time(parts):
    model = parts.random_model("tiny", None, "cpu", torch.float32)
    once, again = (list(parts.Filling(model, 2, 50).layer(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(*once)


def test_floor_of_decode(parts):
    model = parts.random_model("tiny", None, "cpu", torch.float32)
    embedding = model.model.embed_tokens.weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embedding
    kv = 2 * 2 * 64 * 4  # keys and values, heads, their size, fp32
    assert parts.decode_bytes(model, [[10, 20], [3, 3]]) == weights + 36 * kv


def test_mixed_rows_disagree_in_every_layer(parts):
    full = parts.rows_mixed(8, 0.75, 8)
    assert full.sum(1).tolist() == [2] * 8
    assert full.any(0).all()
    assert not full.all(0).any()


def arguments(path, **given):
    return argparse.Namespace(
        **{
            "device": "cpu",
            "json": path,
            "resume": True,
            "only": None,
            "steps": 3,
            "at_once": 1,
            **given,
        }
    )


def test_a_record_is_taken_up_again(parts, tmp_path):
    path = tmp_path / "r.json"
    first = parts.Record("b", arguments(path))
    first.add({"name": "x"})
    first.add({"name": "y", "failed": "no memory"})
    second = parts.Record("b", arguments(path, only="y"))
    assert second.has("x")
    assert not second.has("y"), "what failed is tried again"
    assert not parts.Record("b", arguments(path, steps=4)).has("x"), "another setting"
    beside = parts.Record("b", arguments(path, at_once=8))
    beside.add({"name": "z"})
    assert [(row["name"], row["at_once"]) for row in beside.rows] == [("x", 1), ("z", 8)]
    assert not parts.Record("b", arguments(path, resume=False)).has("x")


def test_a_lost_device_ends_the_process_and_its_row_is_not_tried_again(
    parts, tmp_path, monkeypatch
):
    path = tmp_path / "r.json"
    assert parts.failure(ValueError("odd"), "cuda" if torch.cuda.is_available() else "cpu") == {
        "failed": "ValueError: odd"
    }
    first = parts.Record("b", arguments(path))

    def gone():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", gone)
    row = {"name": "x", **parts.failure(RuntimeError("illegal"), "cuda")}
    with pytest.raises(SystemExit, match="x: RuntimeError: illegal"):
        first.add(row)
    assert parts.Record("b", arguments(path)).has("x")


def test_a_failing_peer_leaves_the_others(run, monkeypatch):
    importlib.import_module("prefill")
    prefill_run = importlib.import_module("prefill_run")
    measure = prefill_run.Prefill.run

    def broken(self, peer):
        if peer.name == "eager":
            raise NotImplementedError("no kernel")
        return measure(self, peer)

    monkeypatch.setattr(prefill_run.Prefill, "run", broken)
    monkeypatch.setattr(prefill_run.Prefill, "router_cost", lambda *_: 1 / 0)
    rows = run(
        "prefill", "--lengths", "400", "--peers", "eager", "flux", "--repeat", "1",
        "--warm-up", "0", "--router-pairs", "2", "--sink", "64", "--local", "128",
    )  # fmt: skip
    assert rows["eager"]["failed"] == "NotImplementedError: no kernel"
    assert rows["flux"]["median"] > 0
    assert rows["routers, Ω=0.00"]["failed"].startswith("ZeroDivisionError")


def test_memory_script_runs_on_a_cpu(run):
    rows = run(
        "memory", "--lengths", "700", "--sink", "64", "--local", "256",
        "--omega", "0.5", "--caches", "static", "flux-growing", "flux", "--only", "flux",
    )  # fmt: skip
    for row in rows.values():
        assert row["kv_bytes"] == row["expected_bytes"]
    static, growing, fixed = rows.values()
    assert growing["trimmed_layers"] == fixed["trimmed_layers"] == 1
    assert growing["share"] < fixed["share"] < static["share"]


def test_compile_time_script_runs_on_a_cpu(run):
    rows = run(
        "compile_time", "--length", "300", "--new", "2", "--layers", "1",
        "--only", "^flux$",
    )  # fmt: skip
    (row,) = rows.values()
    assert row["same_tokens"]
    for process in (row["cold"], row["second"]):
        assert process["compile"] > 0
        assert process["graphs"] == 2
        assert len(process["first"]) == len(process["tokens"]) == 2
