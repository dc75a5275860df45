"""Find every attention of a Dynamo graph: SDPA calls, and softmax written out between matmuls."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.passes.graph_util import argument, is_tensor, op_name, value_of
from fluxcompile.passes.site import AttentionSite, Skip, SkipReason
from fluxcompile.passes.views import permutation

_SDPA = {functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_ROUNDING = {"to", "type", "float", "half", "bfloat16", "type_as"}
_MATMUL = {"matmul", "bmm", "__matmul__"}


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """All attentions in graph order. Changes nothing.

    A site whose inputs cannot be read carries its ``skip``; a softmax that is no attention (over
    a router or a vocabulary) is not a site at all.
    """
    sites = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _SDPA:
            site = _from_sdpa(node)
        elif op_name(node) == "softmax":
            site = _from_softmax(node)
        else:
            continue
        if site is not None:
            site.index = len(sites)
            site.path = module_path(node)
            sites.append(site)
    return sites


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that a node was traced in, from the compiled root."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    name = list(stack.values())[-1][0]
    for prefix in ("L['self'].", "L['fn'].", "L['self']", "L['fn']"):
        name = name.removeprefix(prefix)
    return name.replace("_modules['", "").replace("']", "").replace("_orig_mod.", "").strip(".")


def _from_sdpa(node: fx.Node) -> AttentionSite:
    query, key, value = (argument(node, p, n) for p, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    dropout = argument(node, 4, "dropout_p", 0.0)
    causal = bool(value_of(argument(node, 5, "is_causal", False)))
    site = AttentionSite(-1, "", node, query, key, value, mask, causal, 1.0)
    shapes = [tuple(value_of(x).shape) for x in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or shapes[0][3] != shapes[2][3]:
        site.skip = Skip(SkipReason.SHAPES, f"got {[list(shape) for shape in shapes]}")
    elif value_of(dropout) != 0.0:
        site.skip = Skip(SkipReason.DROPOUT, f"dropout_p={dropout}")
    else:
        scale = argument(node, 6, "scale")
        _set_scale(site, scale, shapes[0][3])
    return site


def _set_scale(site: AttentionSite, scale: object, head_dim: int) -> None:
    number = value_of(scale)
    if number is None:
        site.scale = 1.0 / math.sqrt(int(head_dim))
    elif isinstance(number, int | float | torch.SymFloat | torch.SymInt):
        site.scale = float(number)  # a module constant: specialising on it costs no recompile
    else:
        site.skip = Skip(SkipReason.SCALE_UNREADABLE, str(scale))


def _from_softmax(node: fx.Node) -> AttentionSite | None:
    """``softmax(q @ k.T * scale [softcapped] + mask) @ v``, each part optional but the matmuls."""
    axis = argument(node, 1, "dim")
    probabilities = value_of(node)
    if not is_tensor(node) or probabilities.dim() != 4 or axis not in (-1, 3):
        return None
    output, dropout, returned = _weighted_values(node)
    if output is None:
        return None
    scores, mask, scale, softcap = _unwrap_scores(node.args[0])
    product = _product(scores)
    if product is None:
        return None
    query, key = product
    site = AttentionSite(
        -1, "", output, query, key, output.args[1], mask, False, scale or 1.0, softcap
    )
    if scale is None:
        site.skip = Skip(SkipReason.SCALE_UNREADABLE)
    elif returned:
        site.skip = Skip(SkipReason.WEIGHTS_RETURNED, node.name)
    elif dropout:
        site.skip = Skip(SkipReason.DROPOUT, f"p={dropout}")
    elif any(value_of(x).dim() != 4 for x in (query, key, site.v)):
        site.skip = Skip(SkipReason.SHAPES)
    elif value_of(query).shape[3] != value_of(site.v).shape[3]:
        site.skip = Skip(SkipReason.SHAPES, "keys and values differ in head_dim")
    return site


def _weighted_values(softmax: fx.Node) -> tuple[fx.Node | None, float, bool]:
    """The matmul with the values, the active dropout, and whether the weights go elsewhere."""
    node, dropout, returned = softmax, 0.0, False
    while True:
        users = list(node.users)
        product = [u for u in users if op_name(u) in _MATMUL and u.args[0] is node]
        if product:
            return product[0], dropout, returned or len(users) > 1
        onward = [u for u in users if op_name(u) in _ROUNDING or op_name(u) == "dropout"]
        if not onward:
            return None, 0.0, False
        returned |= len(users) > 1
        node = onward[0]
        if op_name(node) == "dropout" and argument(node, 2, "training", True):
            dropout = float(value_of(argument(node, 1, "p", 0.5)))


def _unwrap_scores(
    node: fx.Node,
) -> tuple[fx.Node, fx.Node | None, float | None, float]:
    """Peel casts, the additive mask, the softcap and the scale off the scores."""
    mask, scale, softcap = None, 1.0, 0.0
    while True:
        name, args = op_name(node), node.args
        if name in _ROUNDING:
            node = args[0]
        elif name in ("add", "iadd") and mask is None and softcap == 0.0 and scale == 1.0:
            if not (is_tensor(args[0]) and is_tensor(args[1])):
                return node, mask, None, softcap
            node, mask = (args[0], args[1]) if _is_scores(args[0]) else (args[1], args[0])
        elif name in ("mul", "truediv", "div", "imul"):
            if (capped := _softcap(node)) is not None and scale == 1.0 and softcap == 0.0:
                node, softcap = capped
                continue
            factor = _number(args[1])
            if factor is None or not is_tensor(args[0]):
                return node, mask, None, softcap
            scale = scale * factor if name in ("mul", "imul") else scale / factor
            node = args[0]
        else:
            return node, mask, scale, softcap


def _is_scores(node: fx.Node) -> bool:
    """True where a matmul lies a few scalings upstream; masks have none."""
    for _ in range(8):
        if op_name(node) in _MATMUL:
            return True
        if not node.args or not is_tensor(node.args[0]) or node.op == "placeholder":
            return False
        node = node.args[0]
    return False


def _softcap(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``tanh(x / c) * c`` gives ``(x, c)``."""
    outer, inner = _number(node.args[1]), node.args[0]
    if outer is None or not is_tensor(inner) or op_name(inner) != "tanh":
        return None
    ratio = inner.args[0]
    if op_name(ratio) not in ("truediv", "div") or _number(ratio.args[1]) != outer:
        return None
    return ratio.args[0], outer


def _number(value: object) -> float | None:
    number = value_of(value)
    if isinstance(number, bool) or not isinstance(number, int | float | torch.SymFloat):
        return None
    return float(number)


def _product(scores: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(q, k)`` of ``q @ k.transpose(-1, -2)``; scalings of q stay in q."""
    if op_name(scores) not in _MATMUL or len(scores.args) < 2:
        return None
    query, flipped = scores.args[:2]
    if op_name(flipped) in ("transpose", "permute", "swapaxes") and is_tensor(flipped):
        rank = value_of(flipped).dim()
        swap = (*range(rank - 2), rank - 1, rank - 2)
        if permutation(flipped) == swap:
            return query, flipped.args[0]
    return None
