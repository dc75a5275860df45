"""The operators as PyTorch sees them: schemas, fakes, autograd, errors, imports."""

import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map_only

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops

from . import cases, router_cases, row_cases, sparse_cases

MIXED = cases.named("mixed-left")
FULL = cases.named("full-left")
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def small(case):
    return cases.prefill(cases.at(case, queries=20, keys=20), torch.float32)


def calls():
    x = small(MIXED)
    mask = x.bounds, x.key_valid, x.flags, None, x.q_start
    bare = cases.prefill(cases.named("full-63"), torch.float32)
    bare = bare.q, bare.k, bare.v
    step = cases.decode(cases.named("mixed-holes-decode"), torch.float32)
    drafts = cases.decode(cases.named("step-holes"), torch.float32)
    bare_step = cases.decode(cases.named("sparse"), torch.float32)
    explicit = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    flux = torch.ops.flux
    routed = x.q, x.k, x.v, *mask, x.route
    out, lse = flux.streaming_attention_lse(*routed, 2, 4, 0, 0.1, 0.0)
    return {
        "mask_bounds": (flux.mask_bounds.default, (x.key_valid,)),
        "read_mask": (flux.read_mask.default, (explicit, torch.zeros(1, dtype=torch.int32))),
        "full": (flux.full_attention.default, (x.q, x.k, x.v, *mask, 0, 0.1, 0.0)),
        "full-bare": (flux.full_attention.default, (*bare, *[None] * 5, 5, 0.1, 2.0)),
        "streaming": (
            flux.streaming_attention.default,
            (*routed, 2, 4, 0, 0.1, 0.0),
        ),
        "lse": (flux.streaming_attention_lse.default, (*routed, 2, 4, 0, 0.1, 0.0)),
        "gradients": (
            flux.streaming_attention_backward.default,
            (out.sin(), out, lse, *routed, 2, 4, 0, 0.1, 0.0),
        ),
        "decode": (flux.decode_attention.default, (*step.operands, 0.1, 0.0)),
        "decode-step": (flux.decode_attention.default, (*drafts.operands, 0.1, 0.0)),
        "decode-bare": (
            flux.decode_attention.default,
            (*bare_step.operands[:4], None, None, 0.1, 0.0),
        ),
        "route_rows": (flux.route_rows.default, router_cases.operands(heads=3, width=16)),
        "project_rows": (
            flux.project_rows.default,
            row_cases.operands(row_cases.Case(24, (5, 5), bias=True, norm=True, gated=True)),
        ),
        "route_features": (flux.route_features.default, router_cases.feature_operands()),
        **{mode: sparse_call(mode) for mode in sparse_cases.MODES},
    }


def sparse_call(mode):
    """The operator of a sparse prefill and its arguments, in the schema's order."""
    (case,) = sparse_cases.named(mode, "mixed-left")
    x = sparse_cases.prefill(cases.at(case, queries=20, keys=20), torch.float32)
    op = getattr(torch.ops.flux, f"{mode}_attention").default
    options = [x.options[a.name] for a in op._schema.arguments if a.name in x.options]
    return op, (x.q, x.k, x.v, *x.extra, *x.key_mask, x.route, *options)


@pytest.mark.parametrize("call", calls(), ids=str)
def test_opcheck(call):
    op, args = calls()[call]
    torch.library.opcheck(op, args, test_utils=UTILS)


@pytest.mark.parametrize("call", calls(), ids=str)
def test_fake_matches_reality(call):
    op, args = calls()[call]
    real = op(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, args))
    real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


def test_flags_are_on_the_cpu_whatever_the_device():
    with torch._subclasses.FakeTensorMode():
        key_valid = torch.ones(2, 5, dtype=torch.bool, device="cuda")
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="cuda")
        q_start = torch.zeros(1, dtype=torch.int32, device="cuda")
        bounds, flags = torch.ops.flux.mask_bounds(key_valid)
        read = torch.ops.flux.read_mask(mask, q_start)
        q = torch.ones(2, 4, 5, 64, device="cuda")
        out = ops.full_attention(q, q, q, bounds, key_valid, flags, scale=1.0)
    assert [x.device.type for x in (bounds, flags, *read)] == ["cuda", "cpu", "cuda", "cuda", "cpu"]
    assert out.device.type == "cuda"


def test_any_strides():
    x = small(MIXED)
    mask = x.bounds, x.key_valid, x.flags, None, x.q_start, x.route
    options = {"sink": 2, "local": 4, "scale": 0.1}
    expected = ops.streaming_attention(x.q, x.k, x.v, *mask, **options)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (x.q, x.k, x.v)]
    torch.testing.assert_close(ops.streaming_attention(*strided, *mask, **options), expected)


@pytest.mark.parametrize("name", ["decode", "block_sparse", "triangle", "gradients"])
def test_grad_is_refused(name):
    op, args = calls()[name]
    for i in (i for i, x in enumerate(args[:3]) if x.is_floating_point()):
        operands = [x.clone().requires_grad_() if j == i else x for j, x in enumerate(args)]
        with pytest.raises(KernelError, match=r"no backward.*expected.*got"):
            op(*operands)
        with torch.no_grad():
            op(*operands)


def _bad_calls():
    def full(**changes):
        x = small(FULL)
        operands = {
            "q": x.q, "k": x.k, "v": x.v, "bounds": x.bounds, "key_valid": x.key_valid,
            "flags": x.flags, "scale": 1.0,
        }  # fmt: skip
        return lambda: ops.full_attention(**operands | changes)

    def streaming(**changes):
        x = small(FULL)
        options = {"sink": 2, "local": 4, "scale": 1.0}
        return lambda: ops.streaming_attention(x.q, x.k, x.v, **options | changes)

    def decode(**changes):
        x = cases.decode(cases.named("sparse"), torch.float32)
        operands = {"q": x.q, "k": x.k, "v": x.v, "query_bounds": x.query_bounds, "scale": 1.0}
        return lambda: ops.decode_attention(**operands | changes)

    def sparse(mode, **changes):
        op, args = sparse_call(mode)
        named = {a.name: x for a, x in zip(op._schema.arguments, args, strict=True)}
        return lambda: op(**named | changes)

    def four(*shape):
        return torch.zeros(*shape, 4, dtype=torch.int32)

    x = torch.randn
    return {
        "q rank": (full(q=x(4, 20, 64)), "q"),
        "q integer": (full(q=torch.ones(2, 4, 20, 64, dtype=torch.int64)), "q dtype"),
        "k dtype": (full(k=x(2, 2, 20, 64).half()), "k"),
        "k batch": (full(k=x(3, 2, 20, 64)), "k"),
        "v shape": (full(v=x(2, 2, 19, 64)), "v"),
        "head dim": (full(k=x(2, 2, 20, 32), v=x(2, 2, 20, 32)), "k"),
        "heads": (full(k=x(2, 3, 20, 64), v=x(2, 3, 20, 64)), "query heads"),
        "bounds dtype": (full(bounds=torch.zeros(2, 2)), "bounds"),
        "bounds alone": (full(key_valid=None, flags=None), "key mask"),
        "flags shape": (full(flags=torch.ones(2, dtype=torch.bool)), "flags"),
        "key_valid length": (full(key_valid=torch.ones(2, 7, dtype=torch.bool)), "key_valid"),
        "unreadable without mask": (full(flags=torch.zeros(4, dtype=torch.bool)), "dense_mask"),
        "dense_mask dtype": (full(dense_mask=x(1, 1, 20, 20)), "dense_mask"),
        "q_start dtype": (full(q_start=torch.zeros(1)), "q_start"),
        "more queries than keys": (full(q=x(2, 4, 21, 64)), "Sq without q_start"),
        "route shape": (streaming(route=torch.ones(3, dtype=torch.bool)), "route"),
        "window": (full(window=-1), "window"),
        "scale": (full(scale=0.0), "scale"),
        "softcap": (full(softcap=-1.0), "softcap"),
        "sink": (streaming(sink=-1), "sink"),
        "local": (streaming(local=0), "local"),
        "head dim too big": (
            lambda: ops.full_attention(*[x(1, 1, 2, 512)] * 3, scale=1.0),
            "head dim",
        ),
        "block mask length": (
            sparse("block_sparse", block_mask=torch.ones(3, 4, 2, 3, dtype=torch.bool)),
            "block_mask",
        ),
        "block mask dtype": (sparse("block_sparse", block_mask=x(3, 4, 2, 2)), "block_mask"),
        "block mask rank": (
            sparse("block_sparse", block_mask=torch.ones(2, 2, dtype=torch.bool)),
            "block_mask",
        ),
        "block": (sparse("block_sparse", block=48), "block"),
        "sparse route": (sparse("block_sparse", route=torch.zeros(2)), "route"),
        "stride": (sparse("xattention", stride=3), "stride"),
        "no threshold": (sparse("xattention", threshold=0.0), "threshold"),
        "threshold": (sparse("xattention", threshold=1.5), "threshold"),
        "power local": (sparse("power", local=0), "local"),
        "last": (sparse("triangle", last=-1), "last"),
        "decode queries": (decode(q=x(2, 4, 9, 64)), "queries a row"),
        "decode no query": (decode(q=x(2, 4, 0, 64)), "queries a row"),
        "decode bounds rank": (decode(query_bounds=four(2)), "query_bounds"),
        "decode bounds of fewer queries": (decode(q=x(2, 4, 2, 64)), "query_bounds"),
        "decode bounds dtype": (decode(query_bounds=four(2, 1).long()), "query_bounds"),
        "decode route": (decode(route=torch.zeros(2)), "route"),
        "mask dtype": (lambda: ops.mask_bounds(x(2, 3)), "key_valid"),
        "mask without queries": (
            lambda: ops.read_mask(
                torch.ones(1, 1, 0, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
            ),
            "mask queries",
        ),
    }


@pytest.mark.parametrize("name", _bad_calls(), ids=str)
def test_bad_operands_are_refused(name):
    call, word = _bad_calls()[name]
    with pytest.raises(KernelError, match=f"{word}.*expected.*got"):
        call()


def test_cuda_without_triton_says_how_to_install(monkeypatch):
    from fluxcompile.kernels.dispatch import triton_module

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError, match="pip install"):
        triton_module("decode")


def test_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # what importing a missing module finds
import torch
from fluxcompile.kernels import ops
x = torch.randn(1, 2, 20, 16)
ops.streaming_attention(x, x, x, sink=2, local=4, scale=1.0)
query_bounds = torch.tensor([[[0, 2, 16, 20]]], dtype=torch.int32)
ops.decode_attention(x[:, :, :1], x, x, query_bounds, scale=1.0)
assert not [m for m in sys.modules if m.startswith("fluxcompile.kernels") and "triton" in m]
"""
    run = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
