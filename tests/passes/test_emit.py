"""Where new nodes are put, and how a branch gets its predicate."""

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from fluxcompile.passes.emit import Emitter


def graph_on(device):
    """``cos(sin(x)) + y`` as recorded, every node with its fake value."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    sin = graph.call_function(torch.sin, (x,))
    cos = graph.call_function(torch.cos, (sin,))
    total = graph.call_function(torch.add, (cos, y))
    graph.output((total,))
    with FakeTensorMode():
        for node in (x, y, sin, cos, total):
            node.meta["example_value"] = torch.empty(2, 3, device=device)
    return Emitter(fx.GraphModule(torch.nn.Module(), graph)), sin, cos, total


def test_after_inserts_in_order_behind_the_last_one():
    emitter, sin, cos, _ = graph_on("cpu")
    with emitter.after(cos, sin):
        emitter.method("neg", cos)
        emitter.method("abs", cos)
    names = [node.name for node in emitter.graph.nodes]
    assert names == ["x", "y", "sin", "cos", "neg", "abs_1", "add", "output"]


def test_after_an_input_means_after_all_inputs():
    emitter, *_ = graph_on("cpu")
    x = next(iter(emitter.graph.nodes))
    with emitter.after(x):
        emitter.method("neg", x)
    assert [node.name for node in emitter.graph.nodes][:3] == ["x", "y", "neg"]
    emitter.graph.lint()


def test_a_decision_on_the_cpu_is_the_reduction_itself():
    emitter, sin, cos, total = graph_on("cpu")
    predicate = emitter.decision(sin, "all", before=total, behind=(cos,))
    assert predicate.target == "all"
    assert predicate.args == (sin,)


@pytest.mark.parametrize("over_rows", ["all", "any"])
def test_a_decision_on_a_gpu_leaves_early_and_is_awaited_late(over_rows):
    emitter, sin, cos, total = graph_on("cuda")
    awaited = emitter.decision(sin, over_rows, before=total, behind=(cos,))
    (sent, behind) = awaited.args
    assert sent.prev is sin
    assert sent.target is torch.ops.flux.send_flag.default
    assert sent.args == (sin, over_rows == "any")
    assert awaited.next is total
    assert list(behind) == [cos]
    emitter.graph.lint()
