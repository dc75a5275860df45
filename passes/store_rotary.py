"""Compute the cosines and sines of rotary embedding once, where several layers read them.

The model does compute them once. But they are pointwise operations, which Inductor repeats in each
kernel that reads them: for every layer and head again, in fp32, at positions so large that a cosine
costs more than all the memory that rotating the queries moves. ``flux::materialize`` keeps it from
doing so.

Legal because it is a copy.
"""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.kernels.validation import MAX_DECODE_QUERIES
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import as_expr, is_tensor, op_name, value_of

#: what models do to a table before they use it
_SCALES = {"mul", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous"}


def store_rotary(gm: fx.GraphModule) -> int:
    """Store every table that several nodes read; returns how many there are."""
    emitter = Emitter(gm)
    tables = dict.fromkeys(
        _finished(node) for node in gm.graph.nodes if op_name(node) in ("cos", "sin")
    )
    stored = 0
    for table in tables:
        if len(table.users) < 2 or not _is_long(table):
            continue
        with gm.graph.inserting_after(table):
            copy = emitter.call(torch.ops.flux.materialize.default, (table,), like=table)
        copy.meta["example_value"] = table.meta["example_value"]
        table.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        stored += 1
    return stored


def _finished(node: fx.Node) -> fx.Node:
    """The table as the layers read it: scaled, and in the model's dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) not in _SCALES or user.all_input_nodes != [node] or not is_tensor(user):
            break
        node = user
    return node


def _is_long(table: fx.Node) -> bool:
    """More positions than a decode step's: those are cheaper to compute than to store.

    (A table that is trained is none of ours: the operator has no backward.)
    """
    value = value_of(table)
    if not is_tensor(table) or value.dim() < 2 or value.requires_grad:
        return False
    positions = as_expr(value.shape[-2])
    return not positions.is_Integer or int(positions) > MAX_DECODE_QUERIES
