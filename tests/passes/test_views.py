"""Symbolic indices through views, against real tensors."""

import functools
import itertools
import operator

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fluxcompile.passes.graph_util import changes_of, erase_dead, mutates
from fluxcompile.passes.views import basic_index, broadcast_index, index_symbols, upstream

from .graphs import qkv, record


def chain(shape, steps):
    """A graph of views on ``arange``, by hand: every node carries its real value."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    node.meta["example_value"] = value
    for kind, name, args in steps:
        if kind == "getitem":
            node = graph.call_function(operator.getitem, (node, args))
            value = value[args]
        elif kind == "function":
            node = graph.call_function(getattr(torch, name), (node, *args))
            value = getattr(torch, name)(value, *args)
        else:
            node = graph.call_method(name, (node, *args))
            value = getattr(value, name)(*args)
        node.meta["example_value"] = value
    return node


def check(node):
    """Every step that ``upstream`` yields names the element that the last node holds."""
    value = node.meta["example_value"]
    symbols = index_symbols(value.dim())
    steps = 0
    for source, index in upstream(node, symbols):
        steps += 1
        read = sympy.lambdify(symbols, index, modules="math")
        origin = source.meta["example_value"]
        for at in itertools.product(*(range(size) for size in value.shape)):
            assert value[at] == origin[read(*at)], f"{source.name}{index} at {at}"
    return steps


def method(name, *args):
    return "method", name, args


def function(name, *args):
    return "function", name, args


def item(*keys):
    return "getitem", "getitem", keys


CHAINS = {
    "gqa": ((2, 2, 3, 4), [
        item(slice(None), slice(None), None, slice(None), slice(None)),
        method("expand", 2, 2, 3, 3, 4), method("reshape", 2, 6, 3, 4),
    ]),
    "gqa-batch-1": ((1, 2, 3, 4), [
        item(slice(None), slice(None), None), method("expand", 1, 2, 3, 3, 4),
        method("reshape", 1, 6, 3, 4),
    ]),
    "repeat-interleave": ((2, 2, 3), [function("repeat_interleave", 3, 1)]),
    "repeat-interleave-last": ((2, 2, 3), [method("repeat_interleave", 2, -1)]),
    "split-heads": ((2, 3, 8), [method("view", 2, 3, 2, 4), method("transpose", 1, 2)]),
    "merge": ((2, 3, 2, 4), [method("transpose", 1, 2), method("flatten", 2)]),
    "unflatten": ((2, 12), [method("unflatten", 1, (3, 4)), method("permute", 2, 0, 1)]),
    "permute-list": ((2, 3, 4), [method("permute", [2, -3, 1])]),
    "ones": ((1, 4), [method("reshape", 4), method("reshape", 1, 2, 1, 2), method("view", 4, 1)]),
    "regroup": ((4, 6), [method("reshape", 2, 12), method("reshape", 8, 3)]),
    "slices": ((5, 6), [item(slice(1, 4), slice(2, None)), item(0), item(None, slice(1, 3))]),
    "negative-int": ((5, 6), [item(-1), item(-2)]),
    "ellipsis": ((2, 3, 4), [item(Ellipsis, 1), item(None, Ellipsis, slice(0, 2))]),
    "broadcast": ((3, 1), [method("expand", 2, 3, 4), method("contiguous")]),
    "broadcast-to": ((1, 3), [function("broadcast_to", (2, 2, 3))]),
    "unsqueeze": ((2, 3), [method("unsqueeze", -1), method("unsqueeze", 0), method("clone")]),
    "swapaxes": ((2, 3, 4), [method("swapaxes", 0, -1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_followed_to_the_source(name):
    shape, steps = CHAINS[name]
    assert check(chain(shape, steps)) == len(steps) + 1


NOT_FOLLOWED = {
    "repeat": ((2, 3), method("repeat", 2, 1)),
    "list-index": ((2, 3), item(slice(None), [1, 0])),
    "list-alone": ((2, 3), ("getitem", "", [1, 0])),
    "bool-index": ((2, 3), ("getitem", "", True)),
    "tensor-index": ((2, 3), item(slice(None), torch.tensor([1, 0]))),
    "step": ((4, 3), item(slice(None, None, 2))),
    "from-the-end": ((4, 3), item(slice(-2, None))),
    "flip": ((2, 3), method("flip", 0)),
    "roll": ((2, 3), method("roll", 1)),
    "view-as-dtype": ((2, 3), method("view", torch.float64)),
    "repeat-all": ((2, 3), method("repeat_interleave", 2)),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_not_followed(name):
    shape, step = NOT_FOLLOWED[name]
    assert check(chain(shape, [step])) == 1


@st.composite
def chains(draw):
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    start, steps = tuple(shape), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["reshape", "transpose", "permute", "unsqueeze", "expand",
                                     "repeat", "slice", "int"]))  # fmt: skip
        rank = len(shape)
        if kind == "transpose":
            a, b = draw(st.integers(-rank, rank - 1)), draw(st.integers(0, rank - 1))
            steps.append(method("transpose", a, b))
            shape[a], shape[b] = shape[b], shape[a]
        elif kind == "permute":
            axes = draw(st.permutations(range(rank)))
            steps.append(method("permute", *axes))
            shape = [shape[axis] for axis in axes]
        elif kind == "unsqueeze" and rank < 5:
            axis = draw(st.integers(0, rank))
            steps.append(method("unsqueeze", axis))
            shape.insert(axis, 1)
        elif kind == "expand":
            grown = [draw(st.sampled_from([1, 2, 3])) if size == 1 else size for size in shape]
            steps.append(method("expand", *grown))
            shape = grown
        elif kind == "repeat":
            axis, times = draw(st.integers(0, rank - 1)), draw(st.integers(1, 3))
            steps.append(method("repeat_interleave", times, axis))
            shape[axis] *= times
        elif kind == "slice":
            axis = draw(st.integers(0, rank - 1))
            first = draw(st.integers(0, shape[axis] - 1))
            steps.append(item(*[slice(None)] * axis, slice(first, None)))
            shape[axis] -= first
        elif kind == "int" and rank > 1:
            axis = draw(st.integers(0, rank - 1))
            place = draw(st.integers(-shape[axis], shape[axis] - 1))
            steps.append(item(*[slice(None)] * axis, place))
            del shape[axis]
        else:
            shape = draw(factorizations(functools.reduce(operator.mul, shape)))
            steps.append(method("reshape", *shape))
        if functools.reduce(operator.mul, shape) > 200:
            break
    return start, steps


@st.composite
def factorizations(draw, number):
    """A shape of ``number`` elements with up to four axes, ones included."""
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        part = draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0]))
        shape.append(part)
        number //= part
    return [*shape, number]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_random_chains(case):
    check(chain(*case))


def test_broadcast_index():
    i, j, k = index_symbols(3)
    assert broadcast_index((2, 1, 3), (i, j, k)) == (i, 0, k)
    assert broadcast_index((3,), (i, j, k)) == (k,)
    assert broadcast_index((), (i, j, k)) == ()


def test_basic_index_keeps_symbolic_starts():
    i, j = index_symbols(2)
    assert basic_index((slice(3, None),), (10, 4), (i, j)) == (i + 3, j)
    assert basic_index(-1, (10, 4), (j,)) == (9, j)


def test_symbolic_reshape_is_followed():
    """Sizes that are symbols cancel: no number of the trace is left in the index."""

    def split(x):
        return x.view(x.shape[0], x.shape[1], 4, 2).transpose(1, 2).contiguous()

    recorded = record(split, torch.randn(3, 5, 8), dynamic=True)
    (output,) = next(iter(reversed(recorded.gm.graph.nodes))).args[0]
    batch, head, token, feature = index_symbols(4)
    *_, (source, index) = upstream(output, (batch, head, token, feature))
    assert source.op == "placeholder"
    assert index == (batch, token, 2 * head + feature)


def test_a_reshape_across_symbols_is_not_followed():
    def mix(x):
        return x.reshape(x.shape[1], x.shape[0])

    recorded = record(mix, torch.randn(3, 5), dynamic=True)
    (output,) = next(iter(reversed(recorded.gm.graph.nodes))).args[0]
    for source, index in upstream(output, index_symbols(2)):
        assert source is output or all(x.free_symbols for x in index)


class TestInPlace:
    """What counts as a change, and what may be swept."""

    @staticmethod
    def recorded(change):
        return record(lambda q, k, v: change(q * 1) + 1, *qkv()).gm.graph

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.mul_(2),
            lambda x: x.__setitem__(0, 1.0) or x,
            lambda x: operator.iadd(x, 1),
            lambda x: operator.imul(x, 2),
            lambda x: x[0].fill_(1) * 1 + x,
            lambda x: x.view(-1)[3:].zero_().sum() + x,
            lambda x: torch.relu_(x),
        ],
        ids=["method", "setitem", "iadd", "imul", "through-item", "through-views", "function"],
    )
    def test_seen(self, change):
        graph = self.recorded(change)
        product = next(node for node in graph.nodes if node.op == "call_function")
        assert changes_of(product)

    def test_operators_named_with_an_underscore_change_nothing(self):
        graph = record(lambda a, b: (a > 0) & (b > 0) | (a < 1), *qkv()[:2]).gm.graph
        names = {node.target for node in graph.nodes if node.op == "call_function"}
        assert {operator.and_, operator.or_} <= names
        assert not any(mutates(node) for node in graph.nodes)

    def test_integers_are_not_changed_in_place(self):
        graph = fx.Graph()
        number = graph.placeholder("n")
        number.meta["example_value"] = 3
        assert not mutates(graph.call_function(operator.iadd, (number, 1)))

    @pytest.mark.parametrize(("own", "swept"), [(True, 3), (False, 1)])
    def test_sweep_spares_changes_that_others_see(self, own, swept):
        def change(x):
            return (x * 1 if own else x).mul_(2) + 1

        graph = record(change, torch.ones(2)).gm.graph
        output = next(iter(reversed(graph.nodes)))
        (dead,) = output.args[0]
        output.args = ((),)
        assert erase_dead(dead) == swept


@pytest.mark.parametrize("operation", ["mT", "mH", "numpy_T", "adjoint"])
def test_transposes_that_torch_traces_as_operators(operation):
    """As torch 2.14 does: they share memory, and ``mT`` is read through."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = torch.arange(12).reshape(3, 4)
    x.meta["example_value"] = value
    call = getattr(torch.ops.aten, operation)
    node = graph.call_function(call, (x,))
    node.meta["example_value"] = call(value)
    written = graph.call_method("add_", (node, 1))
    assert changes_of(x) == [written]
    if operation == "mT":
        check(node)
