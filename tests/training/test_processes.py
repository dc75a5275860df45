"""Two processes over gloo train the router that one process trains."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fluxcompile import FluxRouter
from fluxcompile.training import adapt_backbone, train_router
from tests.training.tiny import CONFIG, QUICK, largest_difference, tiny_data, tiny_model

SCRIPT = Path(__file__).with_name("one_of_many.py")
SETTINGS = {"batch_size": 4, "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 3}

FIELDS = {"standardize": True, "segments": "separate"}
FEW = SETTINGS | {"calibration_rows": 7, "max_steps": 2}  # shared unevenly
ADAPT = SETTINGS | {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}


def run_two(runs: list[dict]) -> list[str]:
    """Runs one after the other in two processes; returns what each process wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(port), json.dumps(runs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=250)[0] for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[FluxRouter, Path]:
    directory = tmp_path_factory.mktemp("one")
    whole_batch = {"per_device_train_batch_size": 4}  # rows padded to each other, too
    settings = QUICK | SETTINGS | whole_batch
    router = train_router(tiny_model(), tiny_data(), output_dir=directory, **settings)
    return router, directory


RUNS = {
    "replicated": {},
    "sharded": {"shard_backbone": True},
    "resumed": {"resume_from_checkpoint": "replicated/checkpoint-3"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[str]]:
    """A directory for each run, for others that calibrate, meet NaN, or adapt the backbone."""
    root = tmp_path_factory.mktemp("two")
    runs = []
    for name, changes in RUNS.items():
        arguments = SETTINGS | changes
        if "resume_from_checkpoint" in arguments:
            arguments["resume_from_checkpoint"] = str(root / changes["resume_from_checkpoint"])
        runs.append({"directory": str(root / name), "arguments": arguments})
    runs.append({"directory": str(root / "standardised"), "arguments": FEW, "fields": FIELDS})
    runs.append({"directory": str(root / "poisoned"), "arguments": SETTINGS, "poisoned": 7})
    runs.append({"directory": str(root / "adapted"), "arguments": ADAPT, "adapt": True})
    for run in runs:
        Path(run["directory"]).mkdir()
    return root, run_two(runs)


def logs_of(directory: Path) -> list[dict]:
    return json.loads((directory / "checkpoint-6" / "trainer_state.json").read_text())[
        "log_history"
    ]


def error_of(directory: Path, rank: int) -> str:
    return (directory / f"error-{rank}.txt").read_text()


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_the_router_of_one(one, two, run):
    (router, ours), (root, output) = one, two
    assert [error_of(root / run, rank) for rank in range(2)] == ["", ""], output
    theirs = root / run
    assert largest_difference(FluxRouter.from_pretrained(theirs), router) < 1e-6
    for a, b in zip(logs_of(ours), logs_of(theirs), strict=True):
        for name in ("lm_loss", "sparsity/holistic", "lambda2/retrieval"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7)


def test_two_processes_calibrate_as_one_does(two):
    root, output = two
    assert [error_of(root / "standardised", rank) for rank in range(2)] == ["", ""], output
    config = dataclasses.replace(CONFIG, **FIELDS)
    ours = train_router(tiny_model(), tiny_data(), **QUICK | FEW | {"config": config})
    theirs = FluxRouter.from_pretrained(root / "standardised")
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(other.feature_mean, one.feature_mean, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            other.feature_deviation, one.feature_deviation, rtol=1e-4, atol=1e-7
        )


def test_nan_in_one_process_stops_both(two):
    root, output = two
    for rank in range(2):
        assert "examples: 7 (holistic)" in error_of(root / "poisoned", rank), output


def test_two_processes_adapt_the_backbone_as_one_does(two):
    root, output = two
    assert [error_of(root / "adapted", rank) for rank in range(2)] == ["", ""], output
    model = tiny_model()
    router = FluxRouter.from_model(model, CONFIG)
    settings = {key: value for key, value in (QUICK | ADAPT).items() if key != "config"}
    adapt_backbone(model, router, tiny_data(), **settings)
    theirs = LlamaForCausalLM.from_pretrained(root / "adapted")
    assert largest_difference(tiny_model(), model) > 0
    assert largest_difference(theirs, model) < 1e-6
