"""Slices of last rows move over what works row by row, and stop before anything else."""

import pytest
import torch
from torch.nn import functional

from fluxcompile.graph_copy import copy_graph
from fluxcompile.passes.graph_util import op_name, value_of
from fluxcompile.passes.last_rows import LastRows

from .graphs import record

BATCH, TOKENS, WIDTH = 2, 6, 8
WEIGHT, SQUARE = torch.randn(WIDTH), torch.randn(WIDTH, WIDTH)
TABLE = torch.randn(TOKENS, WIDTH)


def x(batch=BATCH):
    torch.manual_seed(0)
    return torch.randn(batch, TOKENS, WIDTH)


def moved(run, *inputs, dynamic=False):
    """The graph of ``run`` once its slices have moved; checked to compute the same."""
    recorded = record(run, *inputs, dynamic=dynamic)
    gm = copy_graph(recorded.gm)
    rows = LastRows()
    rows.find(gm.graph)
    rows.move_up()
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(recorded.run(gm), recorded.run(), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
    _shapes_agree(gm, recorded)
    return gm


def _shapes_agree(gm, recorded):
    """What the nodes' values say is what comes out when the graph runs."""
    if any(isinstance(value, torch.SymInt) for value in recorded.inputs):
        return

    class Check(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and node.op.startswith("call"):
                value = value_of(node)
                assert (tuple(value.shape), value.dtype) == (tuple(result.shape), result.dtype)
            return result

    with torch.no_grad():
        Check(gm).run(*(x.clone() for x in recorded.inputs))


def sliced(gm):
    """What the slices of last rows read."""
    picked = [node for node in gm.graph.nodes if op_name(node) == "getitem"]
    return [
        op_name(node.args[0])
        for node in picked
        if isinstance(node.args[1], tuple) and node.args[1][-1] == slice(-1, None)
    ]


ROW_BY_ROW = {
    "add": lambda x: x + x * 2,
    "weight": lambda x: WEIGHT * x - 1,
    "table": lambda x: x / TABLE,
    "pow": lambda x: -x.pow(2),
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "dtype": lambda x: x.to(torch.float64).float(),
    "type_as": lambda x: (x.double() * 2).type_as(x),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean": lambda x: x.mean(-1).unsqueeze(-1) * WEIGHT,
    "layer_norm": lambda x: functional.layer_norm(x, (WIDTH,), WEIGHT, WEIGHT),
    "rms_norm": lambda x: functional.rms_norm(x, (WIDTH,), WEIGHT),
    "linear": lambda x: functional.linear(x, SQUARE, WEIGHT),
    "matmul": lambda x: x @ SQUARE,
    "batched": lambda x: torch.matmul(x, x.transpose(1, 2).contiguous()),
    "softmax": lambda x: x.softmax(dim=-1),
    "halves": lambda x: torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), dim=-1),
    "chunk": lambda x: torch.mul(*x.chunk(2, dim=-1)),
    "split": lambda x: torch.mul(*x.split((WIDTH // 2, WIDTH // 2), dim=-1)),
    "heads": lambda x: (2 * x.view(BATCH, TOKENS, 2, -1)).flatten(2),
    "reshape": lambda x: (2 * x.reshape(BATCH, -1, 2, 4)).reshape(BATCH, TOKENS, -1),
    "unflatten": lambda x: (2 * x.unflatten(-1, (2, -1))).flatten(-2),
    "transposed": lambda x: (2 * x.transpose(0, 1).contiguous()).transpose(0, 1),
    "permuted": lambda x: (2 * x.permute(2, 0, 1)).permute(1, 2, 0),
    "expanded": lambda x: x[:, :, None].expand(BATCH, TOKENS, 3, WIDTH).sum(2),
    "all_of_it": lambda x: x[:, 0:TOKENS, 1:] * 2,
}


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_moves_over(name):
    gm = moved(lambda x: ROW_BY_ROW[name](x)[:, -1:], x())
    assert set(sliced(gm)) <= {"placeholder", "transpose", "contiguous"}
    for node in gm.graph.nodes:
        if node.op.startswith("call") and isinstance(value_of(node), torch.Tensor):
            is_whole = TOKENS in value_of(node).shape[1:2]
            assert not is_whole or name == "batched", f"{node} is of all tokens"


@pytest.mark.parametrize("name", ["rms", "halves", "linear", "chunk"])
def test_moves_over_symbols(name):
    gm = moved(lambda x: ROW_BY_ROW[name](x)[:, -1:, :], x(), dynamic=True)
    assert set(sliced(gm)) == {"placeholder"}


def test_heads_of_symbolic_lengths():
    def run(x):
        return (2 * x.view(*x.shape[:2], 2, 4).transpose(1, 2)).transpose(1, 2).flatten(2)[:, -1:]

    assert sliced(moved(run, x(), dynamic=True)) == ["placeholder"]


def test_an_index_becomes_a_slice():
    assert sliced(moved(lambda x: functional.silu(x)[:, -1], x())) == ["placeholder"]


def test_one_row_is_followed_through_merged_axes():
    """As GPT-2 projects: tokens of one row stay apart where rows are merged."""

    def run(x):
        return torch.addmm(WEIGHT, x.view(-1, WIDTH), SQUARE).view(x.shape)[:, -1:]

    assert sliced(moved(run, x(batch=1))) == ["placeholder"]
    assert sliced(moved(run, x(batch=2))) == ["view"]


STOPS = {
    "cumsum": lambda x: x.cumsum(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "norm": lambda x: functional.layer_norm(x, (TOKENS, WIDTH)),
    "sort": lambda x: x.sort(1).values,
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "cat": lambda x: torch.cat((x, x), dim=1),
    "shift": lambda x: x[:, :-1],
    "stride": lambda x: x[:, ::2],
    "mixed": lambda x: x.view(BATCH, WIDTH, TOKENS),
    "chunks": lambda x: x.chunk(2, dim=1)[0],
    "chunks_left": lambda x: x.chunk(2, dim=-1)[0] + x.chunk(2, dim=-1)[1].cumsum(1),
    "einsum": lambda x: torch.einsum("bsd,de->bse", x, SQUARE),
    "tokens": lambda x: torch.matmul(TABLE @ TABLE.T, x).cumsum(1),
    "in_place": lambda x: functional.relu(x * 1, inplace=True),
}


@pytest.mark.parametrize("name", STOPS)
def test_stops_before(name):
    gm = moved(lambda x: STOPS[name](x)[:, -1:] * 2, x())
    assert sliced(gm)


@pytest.mark.parametrize("name", ["cumsum", "sort", "flip", "roll", "mixed", "einsum"])
def test_stays_where_it_was(name):
    gm = moved(lambda x: STOPS[name](x)[:, -1:], x())
    (source,) = sliced(gm)
    assert source != "placeholder"


def test_active_dropout_stops():
    recorded = record(lambda x: functional.dropout(x, 0.5, training=True)[:, -1:], x())
    rows = LastRows()
    rows.find(recorded.gm.graph)
    rows.move_up()
    assert sliced(recorded.gm) == ["dropout"]


def test_other_readers_keep_all_rows():
    def run(x):
        y = functional.silu(x)
        z = y * 2
        return z[:, -1:] + 1, y

    assert sliced(moved(run, x())) == ["silu"]


def test_slices_of_several_axes_stay():
    def run(x):
        y = functional.silu(x)
        return y[:, -1:], y[-1:]

    assert sliced(moved(run, x())) == ["silu", "silu"]


def test_equal_slices_are_one():
    def run(x):
        y = functional.silu(x)
        return y[:, -1:], y[:, -1:, :] * 2, y[:, -1]

    gm = moved(run, x())
    assert sliced(gm) == ["placeholder"]
    assert [op_name(node) for node in gm.graph.nodes].count("silu") == 1


def test_other_slices_are_not_meant():
    def run(x):
        y = functional.silu(x)
        return y[:, -2:], y[:, :-1], y[:, -1:, 2:], y[:, -1::1] * 0

    assert sliced(moved(run, x())) == ["silu"]


def test_what_changes_in_place_is_read():
    def changed_before(x):
        y = functional.silu(x)
        y += 1
        return (y * 2)[:, -1:]

    def changed_after(x):
        y = functional.silu(x)
        z = y.view(BATCH, TOKENS, 2, 4)
        last = z[:, -1:]
        y.mul_(3)
        return last * 1

    def changed_itself(x):
        y = x * 2
        last = y[:, -1:]
        last.add_(1)
        return y

    for run in (changed_before, changed_after, changed_itself):
        assert "placeholder" not in sliced(moved(run, x()))


def test_whole_numbers_are_left_alone():
    gm = moved(lambda ids: (ids + 1)[:, -1:], torch.arange(12).view(2, 6))
    assert sliced(gm) == ["add"]
