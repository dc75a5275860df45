"""Two processes over gloo: heads of one model split between them, or a model for each.

What one process decides and computes is what they decide and compute: equal routes on both, which
also keeps their branches, and so their collectives, in step.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parallel.cases import GIVEN, make
from tests.parity.decide import decide, margins
from tests.parity.harness import (
    TOLERANCE,
    Generated,
    assert_follows,
    assert_logits,
    definition_of,
)
from tests.parity.models import flux_config
from tests.parity.reference import routed_logits

SCRIPT = Path(__file__).with_name("one_of_two.py")
KINDS = ("llama", "qwen3")
TENSOR = {
    # Qwen3 has a norm between a query and its projection.
    "tensor-qwen3": {"kind": "qwen3", "calls": ("generate",)},
    "tensor-llama": {"kind": "llama", "calls": ("forward", "generate")},
    "tensor-aot": {"kind": "llama", "calls": ("forward", "generate"), "lowering": "aot_eager"},
}
SLOW = ("tensor-llama", "tensor-aot")


@pytest.fixture(scope="module")
def served(tmp_path_factory, request) -> Path:
    """A directory with what each process made of each job."""
    slow = request.config.getoption("--slow")
    jobs = [{"name": "data", "kind": "llama", "parallel": "data", "calls": ("forward",)}]
    jobs += [
        {"name": name, "parallel": "tensor", **job}
        for name, job in TENSOR.items()
        if slow or name not in SLOW
    ]
    directory = tmp_path_factory.mktemp("served")
    for kind in KINDS:
        model, router = make(kind)
        model.save_pretrained(directory / kind)
        router.save_pretrained(directory / f"{kind}-router")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(SCRIPT)]
    started = [
        subprocess.Popen(
            [*command, str(rank), port, str(directory), json.dumps(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=250)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return directory


def result(directory: Path, name: str, rank: int) -> dict:
    found = torch.load(directory / f"{name}-{rank}.pt", weights_only=False)
    assert "error" not in found, found["error"]
    return found


def expected(kind: str):
    """The model, and what one process decides; its rows differ, and by a wide margin."""
    model, router = make(kind)
    full = decide(model, router, GIVEN)
    assert margins(model, router, GIVEN) > 1e-2
    assert full[0].ne(full[1]).any()
    return model, full


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TENSOR]
)
def test_heads_split_between_two_processes(served, name):
    model, full = expected(TENSOR[name]["kind"])
    definition = definition_of(full, flux_config())
    wanted = routed_logits(model, definition, GIVEN.ids, attention_mask=GIVEN.mask, use_cache=False)
    for rank in range(2):
        got = result(served, name, rank)
        assert all(", 2," in shape for shape in got["heads"]), got["heads"]  # of 4
        assert "routed: full or streaming" in got["became"]
        assert torch.equal(got["generated_routes"], full)
        if "logits" in got:
            assert torch.equal(got["routes"], full)
            assert_logits(got["logits"], wanted, GIVEN.valid)
        generated = Generated(got["tokens"], got["token_logits"])
        assert_follows(model, generated, GIVEN, definition)


def test_a_model_for_each_process(served):
    """Data parallel serving needs nothing: each row is what it is in a batch of two."""
    model, full = expected("llama")
    definition = definition_of(full, flux_config())
    wanted = routed_logits(model, definition, GIVEN.ids, attention_mask=GIVEN.mask, use_cache=False)
    for rank in range(2):
        got = result(served, "data", rank)
        assert torch.equal(got["routes"], full[rank : rank + 1])
        worst = (got["logits"][0] - wanted[rank])[GIVEN.valid[rank].bool()].abs().max().item()
        assert worst <= TOLERANCE
