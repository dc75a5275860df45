"""Cosines and sines are computed once for all layers."""

import pytest
import torch

from fluxcompile.config import FluxConfig
from fluxcompile.kernels import ops
from fluxcompile.kernels.validation import MAX_DECODE_QUERIES
from fluxcompile.passes.plan import Policy
from fluxcompile.passes.store_rotary import store_rotary

from . import hugging_face as hf
from .graphs import op_counts, record

STORE = "materialize.default"
POSITIONS = MAX_DECODE_QUERIES + 1


def stored(call, *inputs):
    recorded = record(call, *inputs)
    found = store_rotary(recorded.gm)
    recorded.gm.recompile()
    assert op_counts(recorded.gm)[STORE] == found
    for got, expected in zip(recorded.run(), call(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("policy", [Policy.FULL, Policy.SPARSE])
def test_a_prompt_stores_two_tables(family, policy):
    recorded = hf.prefill(family)
    result = recorded.rewrite(policy, FluxConfig(sink=2, local=3))
    assert op_counts(result.gm)[STORE] == 2
    for name in ("cos", "sin"):
        (table,) = [node for node in result.gm.graph.nodes if node.target == name]
        while table.target is not torch.ops.flux.materialize.default:
            (table,) = table.users
        assert len(table.users) >= hf.LAYERS, "every layer reads what is stored"
    if policy is Policy.FULL:
        recorded.check(result)


def test_a_decode_step_stores_nothing():
    assert op_counts(hf.decode().rewrite().gm)[STORE] == 0


def test_what_is_read_once_is_not_stored():
    def call(x, angles):
        return (x * angles.cos(),)

    assert stored(call, torch.randn(2, POSITIONS, 4), torch.randn(1, POSITIONS, 4)) == 0


def test_scaled_and_rounded_before_it_is_stored():
    def call(x, angles):
        table = (angles.cos() * 0.5).to(torch.bfloat16)
        return x * table, x + table

    x = torch.randn(2, POSITIONS, 4, dtype=torch.bfloat16)
    angles = torch.randn(1, POSITIONS, 4)
    recorded = record(call, x, angles)
    assert store_rotary(recorded.gm) == 1
    recorded.gm.recompile()
    (store,) = [
        n for n in recorded.gm.graph.nodes if n.target is torch.ops.flux.materialize.default
    ]
    assert store.args[0].target == "to"
    assert len(store.users) == 2
    for got, expected in zip(recorded.run(), call(x, angles), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_products_with_activations_are_not_stored():
    def call(x, angles):
        rotated = x * angles.sin()
        return rotated + 1, rotated + 2

    assert stored(call, torch.randn(1, POSITIONS, 4), torch.randn(1, POSITIONS, 4)) == 0


def test_the_operator():
    x = torch.randn(3, 4, 5).transpose(0, 2)
    copy = ops.materialize(x)
    assert copy.is_contiguous()
    torch.testing.assert_close(copy, x, rtol=0, atol=0)
    copy.zero_()
    assert x.abs().sum() > 0
    torch.library.opcheck(torch.ops.flux.materialize.default, (x,))
