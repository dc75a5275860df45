"""Find every attention of a Dynamo graph: SDPA calls, and softmax written out between products."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.kernels.validation import MAX_HEAD_DIM
from fluxcompile.passes.axes import BATCH, HEAD, KEY, QUERY
from fluxcompile.passes.graph_util import argument, hint, is_tensor, op_name, value_of
from fluxcompile.passes.site import AttentionSite, MaskTerm, MaskUse, Skip, SkipReason
from fluxcompile.passes.views import broadcast_index
from fluxcompile.passes.written_out import written_out

_SDPA = {functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}


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
            site = written_out(node)
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
    if is_tensor(mask):
        site.mask_terms = _mask_of_sdpa(query, key, mask)
    if value_of(dropout) != 0.0:
        site.skip = Skip(SkipReason.DROPOUT, f"dropout_p={dropout}")
    else:
        _set_scale(site, argument(node, 6, "scale"), value_of(query).shape[-1])
    return site


def _mask_of_sdpa(query: fx.Node, key: fx.Node, mask: fx.Node) -> tuple[MaskTerm, ...]:
    """The mask, read where it is broadcast to ``[B, H, Sq, Skv]``."""
    sizes = (*value_of(query).shape[:-1], value_of(key).shape[-2])
    axes = (BATCH, HEAD, QUERY, KEY)[4 - len(sizes) :]
    if len(sizes) > len(axes) or value_of(mask).dim() > len(sizes):
        return ()  # what is not of four axes is not rewritten
    element = broadcast_index(sizes, axes)
    return (MaskTerm(mask, broadcast_index(tuple(value_of(mask).shape), element), MaskUse.KEEPS),)


def _misfit(site: AttentionSite) -> Skip | None:
    """What PyTorch computes by broadcasting or promotion and the kernels do not."""
    roles = {role: getattr(site, role) for role in ("q", "k", "v")}
    values = [value_of(node) for node in roles.values()]
    shapes = [
        [*(site.sources[role].shape if role in site.sources else value_of(node).shape)]
        for role, node in roles.items()
    ]
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
