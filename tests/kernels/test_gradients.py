"""Gradients of full and streaming attention on a CPU, eager and compiled."""

import pytest
import torch

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases, gradient_cases

LOW = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("full_attention", "streaming_attention", "streaming_attention_lse")
UTILS = (
    "test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic",
)  # fmt: skip


def operands(name, dtype=torch.float32, **changes):
    """Operands of the case of that name, with other sizes if asked."""
    return cases.prefill(cases.at(gradient_cases.named(name), **changes), dtype)


@pytest.mark.parametrize("case", gradient_cases.CASES, ids=cases.name)
def test_gradients_equal_definition(case):
    x = cases.prefill(case, torch.float32)
    gradient_cases.assert_within_bound(x, gradient_cases.gradients(x, x.run))


@pytest.mark.parametrize("dtype", LOW, ids=cases.name)
@pytest.mark.parametrize("name", ["full-300", "mixed-both", "mixed-holes"])
def test_gradients_low_precision(name, dtype):
    x = operands(name, dtype)
    gradient_cases.assert_within_bound(x, gradient_cases.gradients(x, x.run))


@pytest.mark.parametrize("name", ["full-300", "mixed-both", "mixed-holes", "mixed-softcap-left"])
def test_double_is_exact(name):
    x = operands(name, torch.float64)
    exact = gradient_cases.gradients(x, lambda: x.reference(torch.float64))
    for a, b in zip(gradient_cases.gradients(x, x.run), exact, strict=True):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck(softcap):
    q = torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, 7, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    torch.autograd.gradcheck(
        lambda *qkv: ops.streaming_attention(*qkv, sink=1, local=3, scale=0.5, softcap=softcap),
        (q, k, v),
    )


def test_output_is_the_one_without_grad():
    x = operands("mixed-left")
    plain = x.run()
    x.q.requires_grad_()
    torch.testing.assert_close(x.run().detach(), plain)


@pytest.mark.parametrize("padding", ["left", "both", "holes"])
def test_keys_that_are_not_valid_get_zeros(padding):
    """And what they hold, NaN here, reaches no other gradient."""
    x = operands(f"mixed-{padding}")
    dq, dk, dv = gradient_cases.gradients(x, x.run)
    invalid = (~x.key_valid)[:, None, :, None]
    assert (dk.masked_select(invalid) == 0).all()
    assert (dv.masked_select(invalid) == 0).all()
    no_key_yet = (x.key_valid.cumsum(-1) == 0)[:, None, :, None]
    assert (dq.masked_select(no_key_yet) == 0).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_unreadable_mask_is_applied_as_it_is(rows):
    x = operands("full-300")
    mask = torch.rand(rows, 1, 300, 300) < 0.3
    mask[:, :, 7] = False
    key_valid, bounds, flags = ops.read_mask(mask.expand(2, -1, -1, -1).contiguous(),
                                             torch.zeros(1, dtype=torch.int32))  # fmt: skip
    key_mask = bounds, key_valid, flags, mask
    found = gradient_cases.gradients(
        x, lambda: ops.full_attention(x.q, x.k, x.v, *key_mask, scale=0.125)
    )

    def expected():
        k, v = (t.repeat_interleave(2, dim=1) for t in (x.k, x.v))
        scores = (x.q @ k.mT * 0.125).masked_fill(~mask, torch.finfo(torch.float32).min)
        return (scores.softmax(-1).masked_fill(~mask, 0) @ v).transpose(1, 2)

    for a, b in zip(found, gradient_cases.gradients(x, expected), strict=True):
        torch.testing.assert_close(a, b)


def test_padded_row_has_the_gradients_of_its_unpadded_run():
    x = operands("mixed-left")
    start = x.bounds[2, 0].item()
    padded = gradient_cases.gradients(x, x.run)
    alone = [t[2:, :, start:].detach().requires_grad_() for t in (x.q, x.k, x.v)]
    out = ops.streaming_attention(*alone, sink=x.case.sink, local=x.case.local, scale=x.scale)
    expected = torch.autograd.grad(out, alone, gradient_cases.grad_out(x)[2:, start:])
    for a, b in zip(padded, expected, strict=True):
        torch.testing.assert_close(a[2:, :, start:], b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_operand_alone(which):
    qkv = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    qkv[which].requires_grad_()
    ops.streaming_attention(*qkv, sink=2, local=4, scale=0.3).sum().backward()
    assert [t.grad is not None for t in qkv] == [i == which for i in range(3)]


def test_no_queries():
    q, k = torch.randn(1, 2, 0, 8, requires_grad=True), torch.randn(1, 2, 5, 8, requires_grad=True)
    ops.full_attention(q, k, k, scale=1.0).sum().backward()
    assert q.grad.shape == q.shape
    assert (k.grad == 0).all()


def test_second_derivatives_are_refused():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    out = ops.full_attention(q, q, q, scale=1.0)
    with pytest.raises(KernelError, match="no backward"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_no_quadratic_buffer(monkeypatch):
    """Weights are made for a block of queries at a time, in every path."""
    from fluxcompile.kernels.streaming.backward import blocks

    queries, scores = [], blocks._scores

    def spy(q, *operands):
        queries.append(q.shape[2] // 2)  # two heads share a KV head
        return scores(q, *operands)

    monkeypatch.setattr(blocks, "_scores", spy)
    for name in ("mixed-none", "mixed-holes", "full-window"):
        x = operands(name, queries=1000, keys=1000)
        gradient_cases.gradients(x, x.run)
    assert max(queries) <= 256


@pytest.mark.parametrize("name", ["mixed-left", "mixed-holes", "full-left", "full-63"])
def test_opcheck(name):
    x = operands(name, queries=20, keys=20)
    qkv = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    mask = x.bounds, x.key_valid, x.flags, None, x.q_start
    flux = torch.ops.flux
    if x.case.sink is None:
        calls = [(flux.full_attention.default, (*qkv, *mask, 0, 0.1, 0.0))]
    else:
        args = *qkv, *mask, x.route, 2, 4, 0, 0.1, 0.0
        calls = [
            (flux.streaming_attention.default, args),
            (flux.streaming_attention_lse.default, args),
        ]
    # Keys that are not valid would show as NaN in the clones that opcheck compares.
    for t in qkv:
        t.data.nan_to_num_()
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=UTILS)


@pytest.mark.parametrize("name", ["mixed-left", "full-left", "streaming-130"])
def test_compiled_gradients_are_equal(name):
    x = operands(name)
    torch.testing.assert_close(
        gradient_cases.gradients(x, torch.compile(x.run, backend="aot_eager", fullgraph=True)),
        gradient_cases.gradients(x, x.run),
        rtol=0, atol=0,
    )  # fmt: skip


def test_inductor():
    """Elementwise work around the attention, and dynamic lengths, as in a model under training."""

    def layer(q, k, v, route):
        out = ops.streaming_attention(
            q.sin(), k * 2, v.cos(), route=route, sink=8, local=40, scale=0.125
        )
        return out.flatten(2).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    route = torch.tensor([True, False])
    for length in (130, 70):
        q = torch.randn(2, length, 4, 16).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(2, 2, length, 16, requires_grad=True) for _ in "kv")
        found, expected = (
            torch.autograd.grad(f(q, k, v, route).square().sum(), (q, k, v))
            for f in (compiled, layer)
        )
        torch.testing.assert_close(found, expected)
