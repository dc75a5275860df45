"""Find every attention of a Dynamo graph: SDPA calls, and softmax written out between matmuls."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.kernels.validation import MAX_HEAD_DIM
from fluxcompile.passes.graph_util import argument, changes_of, hint, is_tensor, op_name, value_of
from fluxcompile.passes.site import AttentionSite, Skip, SkipReason
from fluxcompile.passes.views import permutation

_SDPA = {functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_ROUNDING = {"to", "type", "float", "half", "bfloat16", "type_as"}
_MATMUL = {"matmul", "bmm", "__matmul__"}
_SCALINGS = {"mul", "imul", "truediv", "div", "itruediv"}
#: how many operations may stand between a product with the keys and its softmax
_SCORE_STEPS = 8


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
            site.skip = site.skip or _misfit(site)
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
    if value_of(dropout) != 0.0:
        site.skip = Skip(SkipReason.DROPOUT, f"dropout_p={dropout}")
    else:
        _set_scale(site, argument(node, 6, "scale"), value_of(query).shape[-1])
    return site


def _misfit(site: AttentionSite) -> Skip | None:
    """What PyTorch computes by broadcasting or promotion and the kernels do not."""
    values = [value_of(x) for x in (site.q, site.k, site.v)]
    shapes = [[*value.shape] for value in values]
    query, key, value = ([hint(size) for size in shape] for shape in shapes)
    dims = [len(shape) for shape in shapes]
    if dims != [4, 4, 4] or key != value or query[0] != key[0] or query[3] != key[3]:
        return Skip(SkipReason.SHAPES, f"got {shapes}")
    if not key[1] or query[1] % key[1] or query[3] > MAX_HEAD_DIM:
        return Skip(SkipReason.SHAPES, f"got {shapes}, head_dim up to {MAX_HEAD_DIM}")
    output = value_of(site.output)
    dtypes = [x.dtype for x in (*values, output) if x is not None]
    if len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        return Skip(SkipReason.DTYPES, f"got {[str(dtype) for dtype in dtypes]}")
    return None


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
        return _hidden_scores(node, output, scores)
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
    elif (change := _changed_in_place(node, scores, output)) is not None:
        site.skip = Skip(SkipReason.SCORES_UNREADABLE, f"changed in place by {change.name}")
    return site


def _hidden_scores(softmax: fx.Node, output: fx.Node, scores: fx.Node) -> AttentionSite | None:
    """Attention whose scores go through a step that is not read: left alone, but not unseen."""
    node = scores
    for _ in range(_SCORE_STEPS):
        if (product := _product(node)) is not None:
            site = AttentionSite(-1, "", output, *product, output.args[1], None, False, 1.0)
            site.skip = Skip(SkipReason.SCORES_UNREADABLE, f"{op_name(scores)} ({scores.name})")
            return site
        sources = [source for source in node.all_input_nodes if is_tensor(source)]
        scored = [source for source in sources if _is_scores(source)]
        if len(scored) != 1:
            return None
        node = scored[0]
    return None


def _changed_in_place(softmax: fx.Node, product: fx.Node, output: fx.Node) -> fx.Node | None:
    """A change to the scores, or to the operands of their product, that the reading missed."""
    chain = [softmax.args[0]]
    while chain[-1] is not product:
        chain.append(next(s for s in chain[-1].all_input_nodes if _is_scores(s)))
    changes = [change for node in chain for change in changes_of(node) if change < softmax]
    for operand in product.args[:2]:
        changes += [change for change in changes_of(operand) if product < change < output]
    return next((change for change in changes if change not in chain), None)


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
        elif name in _SCALINGS:
            if (capped := _softcap(node)) is not None and scale == 1.0 and softcap == 0.0:
                node, softcap = capped
                continue
            scaled, factor = _scaling(node)
            if scaled is None:
                return node, mask, None, softcap
            scale, node = scale * factor, scaled
        else:
            return node, mask, scale, softcap


def _is_scores(node: fx.Node) -> bool:
    """True where a matmul lies a few scalings upstream; masks have none."""
    for _ in range(_SCORE_STEPS):
        if op_name(node) in _MATMUL:
            return True
        operands = [operand for operand in node.args[:2] if is_tensor(operand)]
        if not operands:
            return False
        node = operands[0]
    return False


def _scaling(node: fx.Node) -> tuple[fx.Node, float] | tuple[None, None]:
    """``(x, c)`` of ``x * c``, ``c * x`` and ``x / (1 / c)``."""
    name, operands = op_name(node), list(node.args[:2])
    if name not in _SCALINGS or len(operands) < 2:
        return None, None
    if name in ("mul", "imul") and not is_tensor(operands[0]):
        operands.reverse()
    scaled, factor = operands[0], _number(operands[1])
    if factor is None or not is_tensor(scaled) or factor == 0.0:
        return None, None
    return scaled, factor if name in ("mul", "imul") else 1.0 / factor


def _softcap(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``tanh(x / c) * c`` gives ``(x, c)``."""
    inner, cap = _scaling(node)
    if inner is None or op_name(inner) != "tanh":
        return None
    ratio, inverse = _scaling(inner.args[0]) if inner.args else (None, None)
    if ratio is None or not math.isclose(cap * inverse, 1.0, rel_tol=1e-6):
        return None
    return ratio, cap


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
