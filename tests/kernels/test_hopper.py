"""The warp-specialised Hopper kernel: it compiles without a GPU, and is right on one."""

import re
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton")
gluon = pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from fluxcompile.kernels.block_sparse import hopper as block_sparse  # noqa: E402
from fluxcompile.kernels.block_sparse import long, short  # noqa: E402
from fluxcompile.kernels.masks.flags import LONG_ROW  # noqa: E402
from fluxcompile.kernels.streaming import hopper  # noqa: E402

from . import cases  # noqa: E402

SHARED_MEMORY = 227 * 1024  # bytes a program may have on Hopper


def served(case):
    """No softcap, no holes, and a block of valid keys in every row."""
    valid = cases.key_validity(case, torch.Generator())
    long_rows = valid is None or bool((valid.sum(-1) >= LONG_ROW).all())
    return long_rows and case.padding != "holes" and not case.softcap


SERVED = tuple(case for case in cases.PREFILL + cases.BIG_PREFILL if served(case))


def compiled(kernel, head_dim, everything, **constants):
    """The kernel's binary for ``cuda:90``."""
    config = hopper.CONFIGS[head_dim, torch.bfloat16]
    names = kernel.arg_names

    def descriptor(block):
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return f"tensordesc<bf16{block},{layout!r}>"

    keys = descriptor([1, 1, config.block_n, head_dim])
    pointers = {"p_route": "*u8", "p_bounds": "*i32", "p_q_start": "*i32", "p_list": "*i16"}
    kinds = {
        "d_q": descriptor([1, 1, 64, head_dim]), "d_k": keys, "d_v": keys,
        "d_out": descriptor([1, 64, 1, head_dim]), "p_count": "*i32", "score_scale": "fp32",
        **pointers,
    }  # fmt: skip
    has = [name for name in names if name.startswith("HAS_")]
    constants = {
        "HEADS": 32, "GROUP": 4, "BLOCK_D": head_dim, "STAGES": config.stages,
        **dict.fromkeys(has, everything), **constants,
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names
    }
    source = GluonASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": 4, "maxnreg": hopper.REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check_binary(binary):
    assert binary.metadata.shared <= SHARED_MEMORY
    for instruction in ("wgmma", "cp.async.bulk.tensor"):
        assert instruction in binary.asm["ptx"]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("flags", ["dense", "streaming", "everything"])
def test_compiles_for_hopper(head_dim, flags):
    chunk = 0 if flags == "streaming" else hopper.CHUNK
    sizes = {"BLOCK_M": hopper.BLOCK_M, "BLOCK_N": 128, "SPARSE": flags != "dense", "CHUNK": chunk}
    sizes["AHEAD"] = flags == "everything"
    check_binary(compiled(hopper.attention_kernel, head_dim, flags == "everything", **sizes))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("rows", ["short", "long"])
def test_block_sparse_compiles_for_hopper(head_dim, everything, rows):
    sizes = {"BLOCK": block_sparse.BLOCK, "MASK_HEADS": 32}
    if rows == "long":
        check_binary(
            compiled(long.attention_kernel, head_dim, everything, CHUNK=8, AHEAD=True, **sizes)
        )
    else:
        stages = {"STAGES": short.STAGES}
        check_binary(compiled(short.attention_kernel, head_dim, everything, **stages, **sizes))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["attention", "long"])
def test_weights_are_computed_beside_the_last_values(head_dim, kernel):
    sizes = {"BLOCK": block_sparse.BLOCK, "MASK_HEADS": 32}
    if kernel == "attention":
        flags = {"SPARSE": False, "CHUNK": hopper.CHUNK, "AHEAD": False}
        blocks = {"BLOCK_M": hopper.BLOCK_M, "BLOCK_N": 128}
        binary = compiled(hopper.attention_kernel, head_dim, False, **flags, **blocks)
    else:
        binary = compiled(long.attention_kernel, head_dim, False, CHUNK=8, AHEAD=True, **sizes)
    # A step's scores are there behind the first wait, its values behind the second.
    steps = re.findall(r"DEPBAR.LE gsb0, 0x1(.*?)DEPBAR.LE gsb0, 0x0", binary.asm["sass"], re.S)
    assert steps
    for step in steps:
        assert step.count("MUFU.EX2") >= block_sparse.BLOCK // 2  # a thread has so many weights


@pytest.mark.parametrize(("keys", "kernel", "extra"), [
    (1000, short, {"n_tail": 2, "STAGES": 2}),
    (40_000, long, {"STAGES": 2, "CHUNK": 1, "AHEAD": True}),
], ids=["short", "long"])  # fmt: skip
def test_every_argument_of_a_block_sparse_kernel_is_given(monkeypatch, keys, kernel, extra):
    """Without a GPU: which kernel is launched, and by its arguments' names with what."""
    given = {}

    class Recorded:
        def __getitem__(self, grid):
            def run(*args, **settings):
                names = [name for name in real.arg_names if not name.isupper()]
                given.update(zip(names, args, strict=True), grid=grid, **settings)

            return run

    real = kernel.attention_kernel
    rows = -(-keys // 128)
    lists, counts = torch.zeros(2, 1, 8, rows, dtype=torch.int16), torch.zeros(2, 1, 8, 2)
    monkeypatch.setattr(kernel, "attention_kernel", Recorded())
    monkeypatch.setattr(block_sparse, "block_lists", lambda *_, **__: (lists, counts))
    q = torch.randn(2, 1000, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, keys, 128, dtype=torch.bfloat16)
    out = block_sparse.attention(
        q, k, v, torch.ones(1), None, None, None, window=7, scale=128**-0.5
    )
    assert out.shape == (2, 1000, 8, 128)
    assert given.keys() - {"grid", "num_warps", "maxnreg"} == set(real.arg_names)
    assert given["d_q"].base is q
    assert given["d_out"].base is out
    assert given["d_k"].base is k
    expected = {
        "n_batch": 2, "n_query_blocks": 8, "n_key_blocks": rows, "n_queries": 1000,
        "n_keys": keys, "window": 7, "HEADS": 8, "GROUP": 4, "MASK_HEADS": 1, "BLOCK": 128,
        "BLOCK_D": 128, "HAS_BOUNDS": False, "HAS_Q_START": False, "HAS_WINDOW": True,
        "grid": (128,), **extra,
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    assert given["p_list"] is lists
    assert given["p_count"] is counts


def test_small_launches_have_short_chunks():
    """Each multiprocessor gets several programs, until a program has a single tile."""
    assert [long.choose_chunk(n, 132) for n in (1, 2048, 4096, 8192, 1 << 20)] == [
        1, 2, 4, 8, 8,
    ]  # fmt: skip


def assert_right(module, x, **options):
    """``attention`` of this module, which is ``hopper`` or its stand-in, on a case's operands."""
    case = x.case
    out = module.attention(
        x.q, x.k, x.v, x.needed_bounds, x.q_start, x.route,
        sink=case.sink, local=case.local, window=case.window, scale=x.scale, **options,
    )  # fmt: skip
    cases.assert_within_bound(x, out)


def check(case, dtype, ahead=False):
    x = cases.prefill(case, dtype, "cuda")
    assert hopper.serves(x.q, x.k, x.v, case.softcap)
    assert_right(hopper, x, ahead=ahead)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("case", SERVED, ids=cases.name)
def test_equals_definition(case, dtype):
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "mixed-none",
        "full-300",
        "full-left",
        "chunk-full",
        "static-cache-full",
        "mixed-window-small",
    ],
)
def test_wide_heads(name):
    for ahead in (False, True):
        check(cases.at(cases.named(name), head_dim=128), torch.bfloat16, ahead)


@pytest.mark.gpu
@pytest.mark.parametrize("route", [None, (True, False)], ids=["streaming", "mixed"])
def test_long_prompt(route):
    case = cases.at(
        cases.named("streaming-300"),
        queries=5000, keys=5000, head_dim=128, heads=8, sink=128, local=2048, route=route,
    )  # fmt: skip
    check(case, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask_heads", [1, 8])
@pytest.mark.parametrize("batch", [2, 6])
def test_block_lists_of_any_length(batch, mask_heads, head_dim):
    """Empty, short and full lists, a tile a multiprocessor and several.

    Of rows of this length `hopper.attention` would take the kernel of short ones.
    """
    make = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, 1000, 8, head_dim, **make).transpose(1, 2)
    k, v = torch.randn(2, batch, 2, 1000, head_dim, **make)
    drawn = torch.rand(batch, mask_heads, 8, 8, device="cuda")
    mask = drawn < torch.linspace(0, 1, 8)[:, None].cuda()
    seen = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :1000, :1000].tril()
    seen = seen.expand(batch, 8, -1, -1)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), seen, enable_gqa=True
    )
    exact = torch.where(seen.any(-1, keepdim=True), exact, 0.0).transpose(1, 2)
    operands, options = (q, k, v, mask, None, None, None), {"window": 0, "scale": head_dim**-0.5}
    launches = {"short": short.launch} | {
        f"long, {chunk} tiles a program, ahead {ahead}": partial(
            long.launch, chunk=chunk, ahead=ahead
        )
        for chunk in (1, 2, 8)
        for ahead in (False, True)
    }
    for name, launch in launches.items():
        out = block_sparse.attention(*operands, **options, launch=launch)
        torch.testing.assert_close(
            out.float(), exact, atol=2e-2, rtol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
def test_refuses_what_it_cannot_serve():
    q = torch.randn(1, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    assert hopper.serves(q, q, q, 0.0)
    assert not hopper.serves(q, q, q, 5.0)
    assert not hopper.serves(q.float(), q.float(), q.float(), 0.0)
    assert not hopper.serves(q[..., :96], q[..., :96], q[..., :96], 0.0)
    repeated = q[:, :1].expand(1, 4, 128, 128)
    assert not hopper.serves(q, repeated, q, 0.0)
