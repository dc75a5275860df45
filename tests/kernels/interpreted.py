"""The Triton kernels through Triton's interpreter; test_interpreter.py runs this file.

Small sizes and tiles: the interpreter takes a twentieth of a second a program, and the tiles must
still meet every kind of key block. No bf16: its matmul is silently wrong there.
"""

import functools
from dataclasses import replace

import pytest
import torch

from fluxcompile.kernels.decode.triton import Config as DecodeConfig
from fluxcompile.kernels.host_flag import triton as flag_triton
from fluxcompile.kernels.project_rows import few_rows, one_row
from fluxcompile.kernels.project_rows import triton as row_triton
from fluxcompile.kernels.router import triton as router_triton
from fluxcompile.kernels.streaming import cuda
from fluxcompile.kernels.streaming.triton import Config

from . import cases, gradient_cases, router_cases, row_cases, triton_checks

TOKENS = 100
TILES = Config(16, 16, 4, 1)


def small(case: cases.Case) -> cases.Case:
    """The case with one head, or one token in three where it is about head groups."""
    if "groups" in case.name:
        return replace(case, queries=20, keys=20, batch=1)
    case = replace(case, heads=2, kv_heads=1, head_dim=24)
    if case.route:
        case = replace(case, batch=2, route=case.route[:2])
    if case.queries == 300:
        case = replace(case, queries=TOKENS)
    if case.q_start is not None:  # a part of a static cache, with empty slots behind it
        case = replace(case, queries=50, keys=200)
    elif case.keys == 300:
        case = replace(case, keys=max(TOKENS, case.queries))
    return replace(case, heads=1) if case.batch > 1 else case


@pytest.mark.parametrize("case", [small(c) for c in triton_checks.PREFILL], ids=cases.name)
def test_prefill(case):
    triton_checks.check_prefill(case, torch.float32, "cpu", TILES)


@pytest.mark.parametrize("name", ["full-left", "mixed-both", "static-cache-mixed"])
def test_prefill_half(name):
    triton_checks.check_prefill(small(cases.named(name)), torch.float16, "cpu", TILES)


@pytest.mark.parametrize(
    "name", ["full-300", "full-left", "full-holes", "chunk-full", "mixed-left"]
)
def test_prefill_dispatch_of_cuda(name):
    """What the CUDA key calls, with the tiles it ships, whichever implementation it picks."""
    x = cases.prefill(small(cases.named(name)), torch.float32)
    operands = x.q, x.k, x.v, x.bounds, x.key_valid, x.flags, None, x.q_start
    options = x.case.window, x.scale, x.case.softcap
    if x.case.sink is None:
        out = cuda.full_attention(*operands, *options)
    else:
        out = cuda.streaming_attention(*operands, x.route, x.case.sink, x.case.local, *options)
    cases.assert_within_bound(x, out)


#: their padding, window or place others have too, with routes besides; a GPU runs these as well
PLAINER = {
    "full-1", "full-2", "full-63", "full-left", "full-right", "full-both", "full-empty",
    "full-window", "full-window-left", "full-softcap", "chunk-full", "static-cache-full",
    "streaming-300", "mixed-right", "mixed-window-small", "window-shorter-right",
}  # fmt: skip
GRADIENTS = [small(c) for c in triton_checks.GRADIENTS if c.name not in PLAINER]


@pytest.mark.parametrize("case", GRADIENTS, ids=cases.name)
def test_gradients(case):
    triton_checks.check_gradients(case, torch.float32, "cpu", TILES, (TILES, TILES))


@pytest.mark.parametrize("name", ["full-left", "mixed-both", "window-shorter-right"])
def test_gradients_half(name):
    tiles = Config(32, 16, 4, 1), Config(16, 32, 4, 1)
    case = small(gradient_cases.named(name))
    triton_checks.check_gradients(case, torch.float16, "cpu", TILES, tiles)


@pytest.mark.parametrize("case", cases.DECODE, ids=cases.name)
def test_decode(case):
    triton_checks.check_decode(case, torch.float32, "cpu", DecodeConfig(32, 4, 1), splits=3)


@pytest.mark.parametrize("splits", [1, 40])
@pytest.mark.parametrize("name", ["mixed-holes-decode", "step-holes"])
def test_decode_half(name, splits):
    case = cases.named(name)
    triton_checks.check_decode(case, torch.float16, "cpu", DecodeConfig(32, 4, 1), splits)


@pytest.mark.parametrize("shape", [(3, 3, 70, 24), (1, 2, 5, 16)], ids=str)
def test_router(shape):
    router_cases.check(router_triton.route_rows, router_cases.operands(*shape))


@pytest.mark.parametrize("tiles", [None, one_row.Config(2, 16, 1)], ids=["shipped", "tiles"])
@pytest.mark.parametrize("case", row_cases.SMALL, ids=str)
def test_project_one_row(case, tiles):
    x = row_cases.operands(case)
    row_cases.check(functools.partial(row_triton.project_rows, config=tiles), x)


@pytest.mark.parametrize("tiles", [None, few_rows.Config(16, 32, 1, 1)], ids=["shipped", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=cases.name)
@pytest.mark.parametrize("case", row_cases.FEW, ids=str)
def test_project_few_rows(case, dtype, tiles):
    x = row_cases.operands(case, dtype)
    row_cases.check(functools.partial(row_triton.project_rows, config=tiles), x)


def test_project_few_large_rows():
    """Rows times the norm's weight are beyond fp16's range; normed rows are not."""
    x, weights, biases, norm, *rest = row_cases.operands(row_cases.FEW[2], torch.float16)
    x = 4000 * x
    row_cases.check(row_triton.project_rows, (x, weights, biases, 12 * norm, *rest))


def test_router_features():
    router_cases.check(router_triton.route_features, router_cases.feature_operands(2, 80, 16))


@pytest.mark.parametrize("any_row", [True, False], ids=["any", "all"])
@pytest.mark.parametrize("true", [0, 1, 70], ids=str)
def test_router_flag(true, any_row):
    rows, flag = torch.arange(70) < true, torch.tensor(False)
    flag_triton.write_flag(rows, any_row, flag)
    assert flag.item() is (true > 0 if any_row else true == 70)
