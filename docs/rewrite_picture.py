"""One attention before and after, drawn from graphs that are traced here.

Left: the operations of the traced graph that the passes took out. Right: those they put in. What
both graphs have (projections, rotary embedding) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import fluxcompile
from fluxcompile.backend import compile_graph
from fluxcompile.graph_copy import copy_graph
from fluxcompile.inspection import forward_apart
from fluxcompile.options import CompileOptions
from fluxcompile.passes.graph_util import op_name

TOKENS = 40
TITLE = f"one attention of a Llama that is routed, a padded prompt of {TOKENS} tokens"
SIZE, LINE, WIDTH, TOP = 12, 19, 540, 84  # pixels
LONGEST = 66  # characters a line


def rewrite_picture() -> str:
    """The picture, as SVG."""
    before, after = traced()
    removed = lines_of(before, after)
    added = lines_of(after, before)
    height = TOP + LINE * max(len(removed), len(added)) + 16
    columns = (
        _column(20, f"taken out: {len(removed)} operations", removed, "#c2410c"),
        _column(20 + WIDTH, f"put in: {len(added)} operations", added, "#0e7490"),
    )
    width = 2 * WIDTH + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="One attention: operations taken out, put in">\n'
        f'<rect width="{width}" height="{height}" rx="14" fill="#f8fafc"/>\n'
        f"{_text(20, 32, TITLE, 15, '#0f172a')}\n"
        f"{''.join(columns)}</svg>\n"
    )


def traced() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph of a one-layer model with a router: as Dynamo gives it, as the passes leave it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    sizes = fluxcompile.FluxConfig(sink=4, local=8)
    fluxcompile.attach(model, fluxcompile.FluxRouter.from_model(model, sizes))
    options = CompileOptions.parse({"lowering": "eager", "strict": True}, None)
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule) -> Any:
        graphs.append(gm)
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(copy_graph(gm))
        return compile_graph(gm, inputs, options, lower_with=keep)

    ids = torch.arange(TOKENS).view(1, TOKENS)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        torch.compile(forward_apart(model), backend=backend)(
            ids, attention_mask=mask, use_cache=False
        )
    before, after = graphs
    return before, after


def lines_of(gm: fx.GraphModule, other: fx.GraphModule) -> list[str]:
    """A line for each operation of ``gm`` that ``other`` lacks; branches below their node."""
    there = {node.name for node in other.graph.nodes}
    lines = []
    for node in gm.graph.nodes:
        if node.name in there or not node.op.startswith("call"):
            continue
        if _picks_output(node):
            continue
        lines.append(_line(node))
        if op_name(node) == "cond":
            for word, branch in zip(("full", "sparse"), node.args[1:3], strict=True):
                lines += [f"  {word}: {text}" for text in _branch(gm, branch, node.args[3])]
    return lines


def _branch(gm: fx.GraphModule, branch: fx.Node, operands: Sequence[fx.Node]) -> list[str]:
    """A branch's operations, over the names that its operands have outside."""
    graph = gm.get_submodule(branch.target).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = {node.name: _name(operand) for node, operand in zip(inputs, operands, strict=True)}
    return [_line(node, names) for node in graph.nodes if node.op.startswith("call")]


def _picks_output(node: fx.Node) -> bool:
    """One of several results: no operation of its own."""
    return op_name(node) == "getitem" and isinstance(node.args[1], int)


def _name(node: fx.Node) -> str:
    if node.op.startswith("call") and _picks_output(node):
        return f"{_name(node.args[0])}[{node.args[1]}]"
    return node.name.removesuffix("_default")


def _line(node: fx.Node, names: Mapping[str, str] = MappingProxyType({})) -> str:
    target = str(node.target) if str(node.target).startswith("flux.") else op_name(node)
    tensors = [
        names.get(arg.name, _name(arg)) for arg in node.all_input_nodes if arg.op != "get_attr"
    ]
    value = node.meta.get("example_value")
    shape = f"  {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    text = f"{target.removesuffix('.default')}({', '.join(tensors)})"
    room = LONGEST - len(shape)
    return (text if len(text) <= room else f"{text[: room - 2]}…)") + shape


def _column(x: int, title: str, lines: Sequence[str], colour: str) -> str:
    texts = [_text(x, 60, title, 13, colour)]
    texts += [
        _text(x, TOP + LINE * i, line, SIZE, colour, mono=True) for i, line in enumerate(lines)
    ]
    return "".join(f"{text}\n" for text in texts)


def _text(x: int, y: int, text: str, size: int, colour: str, mono: bool = False) -> str:
    family = "ui-monospace, Menlo, DejaVu Sans Mono, monospace" if mono else "system-ui, sans-serif"
    return (
        f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" fill="{colour}" '
        f'xml:space="preserve">{escape(text)}</text>'
    )
