"""The benchmarks run, count right and see a wrong attention."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fluxcompile
from tests.router_models import random_router
from tests.scripts import FOLDER, forget_scripts, run_script


@pytest.fixture
def prefill(monkeypatch):
    """The script's parts as modules; scripts import their neighbours by bare name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import checking
    import models
    import prefill_run
    import routing

    yield argparse.Namespace(
        **{**vars(models), **vars(checking), **vars(routing), **vars(prefill_run)}
    )
    forget_scripts()


def test_prefill_script_runs_on_a_cpu(tmp_path):
    file = tmp_path / "prefill.json"
    run_script(
        "prefill.py", "--lengths", "300", "--peers", "eager", "flux", "flux-router",
        "--omega", "0.5", "--router", "--chunk", "200", "--router-pairs", "2", "--repeat", "2",
        "--sink", "64", "--local", "128", "--lowering", "eager", "--json", str(file),
    )  # fmt: skip
    record = json.loads(file.read_text())
    assert {"date", "commit", "device", "torch", "transformers"} <= record["environment"].keys()
    assert record["complete"]
    *results, cost = record["results"]
    assert [result["peer"] for result in results] == [
        "eager",
        "flux",
        "flux-router",
        "flux Ω=0.50",
        "flux Ω=0.50, router",
        "flux Ω=0.50, router, chunks of 200",
    ]
    for result in results:
        assert result["length"] == 300
        assert result["error"] < 1e-5
        assert result["median"] > 0
        assert len(result["times"]) == 2
    assert results[1]["sites"] == 2
    assert results[1]["passes"] > 0
    assert results[3]["floor"] < results[1]["floor"]
    assert (cost["omega"], len(cost["added"]), len(cost["control"])) == (0.5, 2, 2)


def test_wrong_attention_is_seen_before_any_speed(prefill):
    """The random model must tell attentions apart, or the check would pass anything."""
    model = prefill.random_model("tiny", None, "cpu", torch.float32)
    args = argparse.Namespace(device="cpu", lowering="eager", peers=[], omega=[], repeat=1)
    config = fluxcompile.FluxConfig(sink=4, local=16)
    bench = prefill.Prefill(model, config, 300, 1e12, args)
    with torch.no_grad():
        full, sparse = bench.expected((1, 1)), bench.expected((0, 0))
    for name, logits in (("sparse", sparse), ("nan", torch.full_like(sparse, float("nan")))):
        with pytest.raises(prefill.WrongLogits, match=f"{name}: logits differ"):
            prefill.checked_error(name, logits, full, model.dtype)
    bound = max(prefill.ERROR_BOUND.values())
    assert (sparse - full).norm() > 2 * bound * full.norm()


@pytest.mark.parametrize(("sink", "local"), [(4, 16), (0, 7), (50, 100), (4, 1)])
def test_pairs_are_those_of_the_mask(prefill, sink, local):
    length = 60
    p, j = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = j <= p
    streaming = causal & ((j < sink) | (p - j < local))
    assert prefill.pairs_full(length) == causal.sum()
    assert prefill.pairs_streaming(length, sink, local) == streaming.sum()


def test_the_floor_counts_what_is_read(prefill):
    """By the module's own linear layers, of which PyTorch counts the operations."""
    model = prefill.random_model("tiny", None, "cpu", torch.float32)
    length, config = 50, model.config
    whole, last = FlopCounterMode(display=False), FlopCounterMode(display=False)
    x = torch.randn(1, length, config.hidden_size)
    layer = model.model.layers[-1]
    with torch.no_grad(), whole:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear(x)
        layer.self_attn.o_proj(torch.randn(1, length, layer.self_attn.o_proj.in_features))
        layer.mlp(x)
    with torch.no_grad(), last:
        layer.self_attn.k_proj(x)
        layer.self_attn.v_proj(x)
        layer.self_attn.q_proj(x[:, -1:])
        layer.self_attn.o_proj(torch.randn(1, 1, layer.self_attn.o_proj.in_features))
        layer.mlp(x[:, -1:])
        model.lm_head(x[:, -1:])
    seen = [prefill.pairs_full(length), length]
    scores = 4 * sum(seen) * config.num_attention_heads * config.head_dim
    expected = whole.get_total_flops() + last.get_total_flops() + scores
    assert prefill.prefill_flops(config, length, seen) == expected


@pytest.mark.parametrize(("layers", "omega", "dense"), [(32, 0.5, 16), (32, 0.75, 8), (3, 1.0, 0)])
def test_dense_layers_are_spread(prefill, layers, omega, dense):
    routes = prefill.spread_dense(layers, omega)
    assert len(routes) == layers
    assert sum(routes) == dense
    places = [i for i, full in enumerate(routes) if full]
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert len(gaps) <= 2


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality_contenders
    import quality_static
    import quality_tiny

    yield argparse.Namespace(
        contenders=quality_contenders, static=quality_static, tiny=quality_tiny
    )
    forget_scripts()


def test_records_are_indented_and_their_lists_of_values_are_not(quality):
    from common import to_json

    record = {
        "values": [1.5, None, True, "a, [b]"], "plain": ["x,\n  y", 2], "empty": [],
        "runs": [{"n": [1, 2]}, {"n": [[3, 4], []]}],
    }  # fmt: skip
    text = to_json(record)
    assert json.loads(text) == record
    assert '"n": [1, 2]\n' in text
    assert '"plain": ["x,\\n  y", 2],\n' in text
    assert text.count("\n") > 12


def test_every_router_takes_part_with_every_bias(quality, tmp_path):
    for name in ("one", "two"):
        random_router().save_pretrained(tmp_path / name)
    given = quality.contenders.given_routers(
        [[f"mine={tmp_path / 'one'}", str(tmp_path / "two")]], [0.0, 1.0]
    )
    assert [(named.name, named.recipe, named.bias) for named in given] == [
        ("mine", "mine", 0), ("mine +1", "mine +1", 1),
        ("mine#2", "mine", 0), ("mine +1#2", "mine +1", 1),
    ]  # fmt: skip
    last = [named.router.layers[0].head[-1].bias for named in given]
    torch.testing.assert_close(last[1] - last[0], torch.tensor([0.0, 1.0]))


def test_quality_script_runs_on_a_cpu(quality, tmp_path):
    """A toy that routes its first layer sparse and its second full, against the two patterns."""
    model, _ = quality.tiny.load_tiny("cpu", torch.float32)
    router = fluxcompile.FluxRouter.from_model(model, fluxcompile.FluxConfig(sink=16, local=64))
    with torch.no_grad():
        router.layers[0].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    router.save_pretrained(tmp_path / "router")
    output = tmp_path / "output"
    shown = run_script(
        "quality.py", "--lowering", "eager", "--lengths", "1536", "--tasks", "needle", "code",
        "--examples", "2", "--batch", "2", "--search-length", "1536", "--search-examples", "1",
        "--methods", "greedy", "exchanged-retrieval", "majority",
        "--router", f"first={tmp_path / 'router'}",
        "--static", "second=1,0", "--output", str(output),
        *([] if importlib.util.find_spec("matplotlib") else ["--no-plots"]),
    )  # fmt: skip
    record = json.loads((output / "quality.json").read_text())
    assert {"date", "commit", "device"} <= record["environment"].keys()
    runs = {run["name"]: run for run in record["runs"]}
    names = [
        "full", "first", "all sparse", "second", "greedy 1/2", "exchanged-retrieval 1/2",
        "majority of first",
    ]  # fmt: skip
    assert list(runs) == names
    assert runs["majority of first"]["routes"] == [0, 1]
    assert [run["omega"] for run in runs.values()] == [0, 0.5, 1, 0.5, 0.5, 0.5, 0.5]
    for routed, static in zip(
        runs["first"]["cells"], runs["majority of first"]["cells"], strict=True
    ):
        assert routed["share_full"] == [0, 1]
        assert routed["values"] == pytest.approx(static["values"], rel=1e-4), "two compiles"
    assert record["two_compiles_of_full_attention_apart"] < 1e-4
    goals = {goal["goal"].split()[0]: goal for goal in record["goals"]}
    assert goals["needle"]["met"] is None, "4096 tokens were not run"
    assert goals["quality"]["note"].split(",")[0] in names
    assert goals["quality"]["met"] is False, "one of the patterns is the router's own"
    assert goals["retrieval"]["met"] is None, "full attention fails the toy's needles"
    assert goals["code"]["met"] is False, "Ω is 0.5"
    assert "MISSED" in shown
    if importlib.util.find_spec("matplotlib"):
        assert {file.name for file in output.iterdir()} >= {"pareto.png", "routes.png"}


@pytest.mark.slow
@pytest.mark.parametrize("through", ["graph", "user"])
def test_quality_of_routers_of_several_sparse_modes(quality, tmp_path, through):
    """Triangle's counterparts are triangle's, and compute what its router does."""
    model, _ = quality.tiny.load_tiny("cpu", torch.float32)
    triangle = {"sparse": "triangle", "last": 200}
    given = []
    for name, fields in (("streaming", {}), ("triangle", triangle), ("again", {})):
        config = fluxcompile.FluxConfig(sink=16, local=64, **fields)
        router = fluxcompile.FluxRouter.from_model(model, config)
        with torch.no_grad():
            router.layers[0].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
        router.save_pretrained(tmp_path / name)
        given += ["--router", f"{name}={tmp_path / name}"]
    shown = run_script(
        "quality.py", "--lowering", "eager", "--lengths", "1100", "--tasks", "needle", "code",
        "--examples", "2", "--batch", "2", "--search-length", "1100", "--search-examples", "1",
        "--methods", "greedy", "majority", *given, "--through", through, "--no-plots",
        "--output", str(tmp_path / "output"),
    )  # fmt: skip
    record = json.loads((tmp_path / "output" / "quality.json").read_text())
    runs = {run["name"]: run for run in record["runs"]}
    modes = {"streaming": "streaming 16+64", "triangle": "triangle 16+64 last 200"}
    assert {name: (run["through"], run.get("sparse")) for name, run in runs.items()} == {
        "full": ("user", None),
        **{name: (through, modes.get(name, modes["streaming"]))
           for name in ("streaming", "triangle", "again")},
        **{f"{name} {modes['streaming']}": ("graph", modes["streaming"])
           for name in ("all sparse", "greedy 1/2", "majority of streaming", "majority of again")},
        **{f"{name} {modes['triangle']}": ("graph", modes["triangle"])
           for name in ("all sparse", "greedy 1/2", "majority of triangle")},
    }  # fmt: skip
    assert modes["triangle"] in shown[shown.index("against full attention") :]

    def values(name):
        return [value for cell in runs[name]["cells"] for value in cell["values"]]

    for name in ("streaming", "triangle"):
        counterpart = values(f"majority of {name} {modes[name]}")
        assert values(name) == pytest.approx(counterpart, rel=1e-5)
    assert values("triangle") != pytest.approx(values("streaming"), rel=1e-5)
    assert values("streaming") == values("again")


def test_sparse_modes_are_told_apart_by_what_they_compute(quality):
    mode, same = quality.contenders.sparse_mode, quality.contenders.same_attention
    config = fluxcompile.FluxConfig(sink=64, local=512)
    assert mode(config) == "streaming 64+512"
    other = {"last": 3, "block": 64, "pool_size": 7, "standardize": True}
    assert same(config, dataclasses.replace(config, **other)), "nothing of this is streaming's"
    for fields, text in (
        ({"decode": "dense"}, "streaming 64+512 dense decode"),
        ({"sparse": "triangle", "last": 32}, "triangle 64+512 last 32"),
        ({"sparse": "power"}, "power 64+512 block 128"),
        ({"sparse": "power", "retrieval": "xattention"},
         "power 64+512 retrieval xattention block 128 stride 16 threshold 0.9"),
    ):  # fmt: skip
        assert mode(dataclasses.replace(config, **fields)) == text


def test_majority_is_sparse_where_the_router_most_often_is(quality):
    from fluxcompile.evaluation import Cell, CellResult

    def cell(task, rows):
        full = torch.tensor(rows, dtype=torch.bool)
        scores = torch.zeros(len(rows))
        return CellResult(Cell(task, 64), scores.double(), scores.bool(), full)

    results = [cell("needle", [[1, 1, 0, 1]]), cell("code", [[1, 0, 0, 1], [1, 0, 0, 0]])]
    results = {result.cell: result for result in results}
    assert quality.static.sparse_layers(results) == 1, "Ω (1/4 + 5/8) / 2 of 4 layers, less"
    assert quality.static.majority(results, 1) == (1, 1, 0, 1)
    assert quality.static.majority(results, 2) == (1, 0, 0, 1)


def run_kernels(tmp_path, *arguments):
    file = tmp_path / "kernels.json"
    run_script("kernels.py", "--json", str(file), *arguments)
    return json.loads(file.read_text())


def test_kernels_script_runs_on_a_cpu(tmp_path):
    kernels = ("dense", "triangle", "block-sparse", "xattention", "decode", "backward")
    record = run_kernels(tmp_path, "--kernels", *kernels)
    assert record["failures"] == []
    assert {row["batch"] for row in record["rows"]} == {1, 2}
    names = {row["kernel"].split(",")[0] for row in record["rows"]}
    assert {"dense rows", "block-sparse", "XAttention choice", "streaming backward"} <= names
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert row["floor"] > 0
        assert all(seconds > 0 for seconds in row["peers"].values())
        assert row["error"] is None or row["error"] < 1e-5
        assert row["bound"] is None, "goals are for the GPU"


# Measures a shape's row at once, but for 8 tokens: there it dies until a file tells it not to.
FAKE_KERNELS = """
import argparse, json, os, sys
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("lengths", "batches", "head-dims", "sink", "local", "at-once"):
    parser.add_argument(f"--{name}", type=int)
for name in ("device", "json"):
    parser.add_argument(f"--{name}")
parser.add_argument("--kernels", nargs="+")
args = parser.parse_args()
file = Path(args.json)
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
row = {"kernel": "decode", "seconds": 1.0, "floor": 0.5, "peers": {}, "error": None, "goal": "",
       "achieved": None, "bound": None, "at_least": False, "batch": args.batches,
       "length": args.lengths, "head_dim": args.head_dims, "sink": args.sink, "local": args.local}
record = {"environment": {"date": f"GPU {gpu}", "commit": "c0ffee"}, "dtype": "x", "heads": 4,
          "kv_heads": 2, "kernels": args.kernels, "matmul_ceiling_flops": args.lengths,
          "copy_ceiling_bytes": 2.0, "rows": [row], "failures": [], "complete": False,
          "at_once": args.at_once, "processes": []}
file.write_text(json.dumps(record))
if args.lengths == 8 and not Path(sys.argv[0]).with_name("mended").exists():
    sys.exit(7)
file.write_text(json.dumps(record | {"complete": True}))
"""


def test_kernels_spread_over_gpus_are_one_record(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import kernel_record
    import kernel_spread
    import kernel_table

    (tmp_path / "fake.py").write_text(FAKE_KERNELS)
    monkeypatch.setattr(kernel_spread, "SCRIPT", tmp_path / "fake.py")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = tmp_path / "kernels.json"

    def spread(*arguments):
        args = kernel_table.parse_arguments(
            ["--gpus", "2", "--json", str(file), "--kernels", "decode", "--lengths", "4", "8",
             "--batches", "1", "--head-dims", "64", "32", *arguments])  # fmt: skip
        where = {"date": "now", "commit": "c0ffee"}
        record = kernel_record.Record(where, "x", 4, 2, args.kernels)
        kernel_spread.spread(args, record, list(kernel_table.shapes(args)))
        kernel_table.print_rows(record, args)
        assert json.loads(file.read_text()) == json.loads(json.dumps(vars(record)))
        return record

    first = spread()
    shapes = [(row["head_dim"], row["length"]) for row in first.rows]
    assert shapes == [(64, 4), (64, 8), (32, 4), (32, 8)], "as one process would have them"
    assert [line.split(",")[0] for line in first.failures] == [
        f"d{size}-s8-b1: its process ended with status 7 after 1 rows" for size in (64, 32)
    ]
    assert (first.matmul_ceiling_flops, first.at_once) == (6, 2)
    assert {process["date"] for process in first.processes} == {"GPU 0", "GPU 1"}
    (tmp_path / "mended").touch()
    again = spread("--resume")
    assert again.rows == first.rows
    assert again.failures == []
    assert not (tmp_path / "kernels.parts").exists(), "all is in the one file"
    (tmp_path / "mended").unlink()
    spread()
    assert {row["sink"] for row in spread("--resume", "--sink", "5").rows} == {5}
    forget_scripts()


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import measured_kernels

    yield measured_kernels
    forget_scripts()


def test_a_wrong_kernel_is_not_timed(measured, monkeypatch):
    """Streaming attention in the place of dense attention must be noticed."""
    setting = measured.Setting(
        1, 300, 4, 2, 64, 16, 64, "cpu", torch.float32, flops=1e12, bytes=1e12
    )
    monkeypatch.setattr(measured, "_ours_dense", measured._ours_streaming)
    monkeypatch.setattr(measured, "device_seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(measured.WrongResult, match="dense"):
        measured.dense(setting)


READ = """
import torch
from reading import is_whole, window_readers

for keys, sink, local in ((300, 16, 100), (100, 16, 100)):
    k, v = torch.randn(2, 1, 2, keys, 64, dtype=torch.float16)
    whole = keys <= sink + local
    window = [x if whole else torch.cat((x[:, :, :sink], x[:, :, -local:]), 2) for x in (k, v)]
    reads = [reader(None, k, v) for reader in window_readers(sink, local)]
    assert all(is_whole(read, *window) for read in reads)
    window[1] = window[1].clone()
    window[1][0, 0, -1, -1] += 1
    assert not any(is_whole(read, *window) for read in reads)
"""


@pytest.mark.slow
def test_readers_read_the_window():
    """In Triton's interpreter."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(path for path in (str(FOLDER), os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", READ], check=True, env=environment)


def test_verdicts(measured):
    row = measured.Measurement("k", 2e-3, 1e-3, achieved=1.2, bound=1.15, at_least=True)
    assert row.met
    assert row.columns()["of floor"] == "2.00×"
    assert not measured.Measurement("k", 1.0, 1.0, achieved=1.2, bound=1.15).met
    assert measured.Measurement("k", 1.0, 1.0, achieved=1.2).met is None
