"""The benchmarks run, count right and see a wrong attention."""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fluxcompile

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def prefill(monkeypatch):
    """The script as a module; scripts import their neighbours by bare name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import prefill

    yield prefill
    for name in ("prefill", "models", "common"):
        sys.modules.pop(name, None)


def test_prefill_script_runs_on_a_cpu(tmp_path):
    file = tmp_path / "prefill.json"
    command = [
        sys.executable, str(FOLDER / "prefill.py"), "--device", "cpu", "--tiny",
        "--lengths", "300", "--peers", "eager", "flux", "flux-router", "--omega", "0.5",
        "--repeat", "2", "--lowering", "eager", "--json", str(file),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    record = json.loads(file.read_text())
    assert {"date", "commit", "device", "torch", "transformers"} <= record["environment"].keys()
    assert [result["peer"] for result in record["results"]] == [
        "eager",
        "flux",
        "flux-router",
        "flux Ω=0.50",
    ]
    for result in record["results"]:
        assert result["length"] == 300
        assert result["median"] > 0
        assert len(result["times"]) == 2
    assert record["results"][1]["sites"] == 2
    assert record["results"][1]["passes"] > 0


def test_wrong_attention_is_seen_before_any_speed(prefill):
    """The random model must tell attentions apart, or the check would pass anything."""
    model = prefill.random_llama("tiny", None, "cpu", torch.float32)
    args = argparse.Namespace(device="cpu", lowering="eager", peers=[], omega=[], repeat=1)
    config = fluxcompile.FluxConfig(sink=4, local=16)
    bench = prefill.Prefill(model, config, 300, 1e12, args)
    with torch.no_grad():
        bench.eager_logits = bench.last_logits(model)
        sparse = bench.last_logits(bench.flux(routes="sparse", config=config))
    with pytest.raises(prefill.WrongLogits, match="differ from eager"):
        bench.checked_error("sparse", sparse)
    with pytest.raises(prefill.WrongLogits, match="differ from eager"):
        bench.checked_error("nan", torch.full_like(sparse, float("nan")))
    bound = max(prefill.ERROR_BOUND.values())
    assert (sparse - bench.eager_logits).norm() > 2 * bound * bench.eager_logits.norm()


@pytest.mark.parametrize(("sink", "local"), [(4, 16), (0, 7), (50, 100), (4, 1)])
def test_pairs_are_those_of_the_mask(prefill, sink, local):
    length = 60
    p, j = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = j <= p
    streaming = causal & ((j < sink) | (p - j < local))
    assert prefill.pairs_full(length) == causal.sum()
    assert prefill.pairs_streaming(length, sink, local) == streaming.sum()


@pytest.mark.parametrize(("layers", "omega", "dense"), [(32, 0.5, 16), (32, 0.75, 8), (3, 1.0, 0)])
def test_dense_layers_are_spread(prefill, layers, omega, dense):
    routes = prefill.spread_dense(layers, omega)
    assert len(routes) == layers
    assert sum(routes) == dense
    places = [i for i, full in enumerate(routes) if full]
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert len(gaps) <= 2
