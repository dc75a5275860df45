"""The linear layers of few tokens become few launches, which give what they gave."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

from fluxcompile.passes.project_rows import project_rows

from .graphs import op_counts, record

ROW = "project_rows.default"
WIDTH, INNER = 32, 48


class Norm(torch.nn.Module):
    """As models write it out."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * y.to(x.dtype)


def linear(rows=WIDTH, columns=WIDTH, bias=False):
    return torch.nn.Linear(columns, rows, bias=bias)


def projected(call, *inputs, devices=("cpu",), tolerance=1e-5):
    """How many launches stand for the layers of ``call``, which still computes the same."""
    torch.manual_seed(0)
    recorded = record(call, *inputs)
    found = project_rows(recorded.gm, devices)
    recorded.gm.graph.lint()
    recorded.gm.recompile()
    assert op_counts(recorded.gm)[ROW] == found
    with torch.no_grad():
        expected = call(*inputs)
    for got, value in zip(recorded.run(), expected, strict=True):
        assert got.shape == value.shape
        torch.testing.assert_close(got, value, atol=tolerance, rtol=tolerance)
    return found, op_counts(recorded.gm)


def token(*shape):
    return torch.randn(*(shape or (1, 1, WIDTH)))


@pytest.mark.parametrize("form", ["written out", "called"])
def test_norm_and_three_projections_are_one(form):
    norm = Norm() if form == "written out" else torch.nn.RMSNorm(WIDTH, eps=1e-5)
    layers = linear(), linear(16), linear(16)
    found, counts = projected(lambda x: tuple(layer(norm(x)) for layer in layers), token())
    assert found == 3, "each reads a norm of its own"

    def shared(x):
        y = norm(x)
        return tuple(layer(y) for layer in layers)

    found, counts = projected(shared, token())
    assert found == 1
    assert not counts["rsqrt"] + counts["rms_norm"] + counts["linear"]


def test_a_whole_block():
    norms, q, k, v, o = (Norm(), Norm()), linear(), linear(16), linear(16), linear()
    gate, up, down = linear(INNER), linear(INNER), linear(WIDTH, INNER)

    def block(x):
        y = norms[0](x)
        attended = (q(y) * 2).view(1, 1, 4, 8).flatten(2)
        x = x + o(attended)
        y = norms[1](x)
        return x + down(functional.silu(gate(y)) * up(y)), k(y * 2), v(y * 2)

    found, counts = projected(block, token())
    assert found == 6, "q; o and its sum; gate and up; down and its sum; k; v"
    assert not counts["linear"] + counts["silu"]


@pytest.mark.parametrize("shape", [(4, 1, WIDTH), (1, 8, WIDTH), (16, WIDTH)], ids=str)
def test_several_rows_of_half_precision(shape):
    """Each result is contiguous, as the model may want to view it."""
    norm, q, k, o = (layer.bfloat16() for layer in (Norm(), linear(), linear(16), linear()))

    def call(x):
        y = norm(x)
        query, key = q(y).view(-1, 4, 8), k(y).view(-1)
        return x + o(query.view(x.shape)), key

    found, counts = projected(call, token(*shape).bfloat16(), tolerance=3e-2)
    assert found == 2
    assert not counts["linear"] + counts["rsqrt"]


def test_any_number_of_rows():
    """Traced for a few, the graph serves any number, and nothing is specialised."""
    torch.manual_seed(0)
    norm, q, k, o = (layer.bfloat16() for layer in (Norm(), linear(), linear(16), linear()))
    gate, up, down = linear(INNER).bfloat16(), linear(INNER).bfloat16(), linear(columns=INNER)
    down = down.bfloat16()

    def call(x):
        y = norm(x)
        query, key = q(y).view(-1, 4, 8), k(y).view(-1)
        x = x + o(query.view(x.shape))
        y = norm(x)
        return x + down(functional.silu(gate(y)) * up(y)), key

    graphs = []

    def backend(gm, inputs):
        found = project_rows(gm, devices=("cpu",))
        gm.recompile()
        graphs.append((found, op_counts(gm)))
        return aot_autograd(fw_compiler=lambda gm, _: gm)(gm, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (3, 8, 16, 40):
            x = token(rows, 1, WIDTH).bfloat16()
            for got, expected in zip(compiled(x), call(x), strict=True):
                assert got.shape == expected.shape
                torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)
    ((found, counts),) = graphs
    assert found == 4
    assert not counts["linear"] + counts["rsqrt"] + counts["silu"]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_either_way(bias, swapped):
    gate, up = linear(INNER, bias=bias), linear(INNER, bias=bias)

    def call(x):
        activated, other = functional.silu(gate(x)), up(x)
        return (other * activated if swapped else activated * other,)

    found, counts = projected(call, token())
    assert found == 1
    assert not counts["silu"]


def test_more_than_three_share_launches():
    layers = [linear(8 * i) for i in range(1, 6)]
    found, _ = projected(lambda x: tuple(layer(x) for layer in layers), token())
    assert found == 2


def test_biases_stand_apart():
    layers = [linear(bias=i % 2 == 0) for i in range(4)]
    found, _ = projected(lambda x: tuple(layer(x) for layer in layers), token())
    assert found == 2


def test_a_norm_that_others_read_stays():
    norm, layer = Norm(), linear()

    def call(x):
        y = norm(x)
        return layer(y), y

    found, counts = projected(call, token())
    assert found == 1
    assert counts["rsqrt"] == 1


def test_a_sum_that_broadcasts_stays():
    layer = linear()
    found, counts = projected(lambda x, y: (y + layer(x),), token(), token(3, 1, WIDTH))
    assert found == 1
    assert counts["add"] == 1


def test_a_product_that_is_read_twice_is_not_added_to():
    layer = linear()

    def call(x):
        y = layer(x)
        return x + y, y

    found, counts = projected(call, token())
    assert found == 1
    assert counts["add"] == 1


def test_a_token_that_changes_between_two_layers():
    first, second = linear(), linear()

    def call(x):
        x = x * 1
        y = first(x)
        x.add_(1)
        return y, second(x)

    assert projected(call, token())[0] == 0


def test_a_matrix_that_changes_between_two_tokens():
    weight = torch.randn(8, WIDTH)

    def call(x, y):
        matrix = weight * 1
        first = functional.linear(x, matrix)
        matrix.add_(1)
        return first, functional.linear(y, matrix)

    assert projected(call, token(), token())[0] == 0


def test_a_residual_stream_that_is_written_in_place():
    norm, layer = Norm(), linear()

    def call(x):
        x = x * 1
        y = norm(x)
        x.mul_(2)
        return (layer(y) + x,)

    found, counts = projected(call, token())
    assert found == 1
    assert counts["rsqrt"] == 1, "the norm read what x was before"


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 2, WIDTH), WIDTH), ((2, 1, WIDTH), WIDTH), ((1, 1, 20), 20)], ids=str
)
def test_left_alone(shape, width):
    """Several rows in fp32; rows of a matrix that cannot be read 16 bytes at a time."""
    layer = linear(8, width)
    assert projected(lambda x: (layer(x),), token(*shape))[0] == 0


def test_too_many_rows_are_left_alone():
    layer = linear().bfloat16()
    assert projected(lambda x: (layer(x),), token(17, WIDTH).bfloat16())[0] == 0


def test_other_devices_are_left_alone():
    layer = linear()
    assert projected(lambda x: (layer(x),), token(), devices=("cuda",))[0] == 0


def test_another_dtype_is_left_alone():
    layer = linear().double()
    assert projected(lambda x: (layer(x),), token().double())[0] == 0


def test_autocast_is_left_alone():
    layer = linear()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (layer(x),)

    assert projected(call, token())[0] == 0
