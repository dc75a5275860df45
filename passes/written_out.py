"""Read ``softmax(scores(q, k)) @ v`` from its softmax, whatever products and views it is made of.

Everything is read at one symbolic element: the softmax's, then the output's, then those of queries,
keys and values. So heads may be an axis of their own, flattened with the batch, or written as
groups over KV heads, and an axis may stand anywhere, as long as the indices say attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from torch import fx

from fluxcompile.passes.axes import (
    BATCH,
    FEATURE,
    Bounds,
    settle,
)
from fluxcompile.passes.contraction import Operand, factors, is_contraction
from fluxcompile.passes.graph_util import argument, changes_of, hint, is_tensor, op_name, value_of
from fluxcompile.passes.operand import Axis, trace_operand
from fluxcompile.passes.scores import (
    ROUNDING,
    STEPS,
    Scores,
    UnreadableScores,
    is_scores,
    read_scores,
)
from fluxcompile.passes.site import AttentionSite, OutputForm, Skip, SkipReason, Source
from fluxcompile.passes.softmax_element import Element, axis_of, elements_of
from fluxcompile.passes.views import Index, view_step

_VIEWS = {"view", "reshape", "flatten", "unflatten", "contiguous", "clone", "squeeze", "unsqueeze"}
_ASKS_SIZES = {"size", "dim", "numel"}


@dataclass
class _Weights:
    """What happens to a softmax's result: the product with the values, and what is in between."""

    product: fx.Node
    chain: list[fx.Node] = field(default_factory=list)
    dropout: float = 0.0
    returned: bool = False


def written_out(softmax: fx.Node) -> AttentionSite | None:
    """The attention around a softmax, with its ``skip`` if it is one that cannot be read.

    None where it is no attention: over other axes, or without both products.
    """
    if not is_tensor(softmax) or value_of(softmax).dim() not in (3, 4, 5):
        return None
    if argument(softmax, 1, "dim") not in (-1, value_of(softmax).dim() - 1):
        return None
    weights = _follow(softmax)
    if weights is None or not is_tensor(softmax.args[0]):
        return None
    problem: AttentionSite | None = None
    for element in elements_of(softmax):
        values = _values(softmax, weights, element)
        if values is None:
            continue
        site = _read(softmax, weights, element, *values)
        if site is not None and site.skip is None:
            return site
        problem = problem or site
    return problem


def _follow(softmax: fx.Node) -> _Weights | None:
    weights = _Weights(softmax, [softmax])
    for _ in range(STEPS):
        node = weights.chain[-1]
        users = [user for user in node.users if op_name(user) not in _ASKS_SIZES]
        products = [user for user in users if is_contraction(user)]
        weights.returned |= len(users) > 1
        if products:
            weights.product = products[0]
            return weights
        onward = [u for u in users if op_name(u) in ROUNDING | _VIEWS or op_name(u) == "dropout"]
        if not onward or onward[0].args[0] is not node:
            return None
        if op_name(onward[0]) == "dropout" and argument(onward[0], 2, "training", True):
            weights.dropout = float(value_of(argument(onward[0], 1, "p", 0.5)))
        weights.chain.append(onward[0])
    return None


def _values(
    softmax: fx.Node, weights: _Weights, element: Element
) -> tuple[OutputForm, Operand] | None:
    """The output's form and the values' operand, if the product reads the softmax's element."""
    rank = value_of(weights.product).dim()
    for form, index in element.forms.items():
        if len(index) != rank:
            continue
        found = factors(weights.product, index, element.index[-1])
        if found is None:
            return None
        for mine, other in (found, found[::-1]):
            ours = mine.node is weights.chain[-1] and other.node is not mine.node
            if ours and _index_at(softmax, mine, weights, element.bounds) == element.index:
                return form, other
    return None


def _index_at(
    softmax: fx.Node, operand: Operand, weights: _Weights, bounds: Bounds
) -> Index | None:
    """The softmax's index behind the index of its last copy."""
    index = settle(operand.index, bounds)
    for node in reversed(weights.chain[1:]):
        if op_name(node) in ROUNDING or op_name(node) == "dropout":
            continue
        step = view_step(node, index)
        if step is None:
            return None
        index = settle(step[1], bounds)
    return index


def _read(
    softmax: fx.Node, weights: _Weights, element: Element, form: OutputForm, values: Operand
) -> AttentionSite | None:
    output = weights.product
    try:
        scores = read_scores(softmax.args[0], element.index, element.bounds)
    except UnreadableScores as problem:
        return _hidden(problem, output, values)
    factored = factors(scores.product, scores.index, FEATURE)
    if factored is None:
        return _unread(scores.product, output, values, "product not read")
    dims = [value_of(x.node).shape[x.index.index(FEATURE)] for x in factored if FEATURE in x.index]
    if not dims:
        return _unread(scores.product, output, values, "product not read")
    sources = _sources(scores, element, factored, values, dims[0], output)
    if isinstance(sources, str):
        return _unread(scores.product, output, values, sources)
    query, key, value = sources
    scale = scores.scale * query.scale * key.scale
    mask = max((term.node for term in scores.terms), default=None)
    site = AttentionSite(
        *(-1, "", output, query.node, key.node, value.node, mask, False, scale, scores.softcap)
    )
    site.mask_terms, site.output_form = tuple(scores.terms), form
    site.sources = {
        role: source
        for role, source in zip(("q", "k", "v"), sources, strict=True)
        if not source.is_plain
    }
    if scale <= 0:
        site.skip = Skip(SkipReason.SCALE_UNREADABLE, f"got {scale}")
    elif weights.returned:
        site.skip = Skip(SkipReason.WEIGHTS_RETURNED, softmax.name)
    elif weights.dropout:
        site.skip = Skip(SkipReason.DROPOUT, f"p={weights.dropout}")
    elif (change := _changed_in_place(softmax, scores, output)) is not None:
        site.skip = Skip(SkipReason.SCORES_UNREADABLE, f"changed in place by {change.name}")
    return site


def _sources(
    scores: Scores,
    element: Element,
    factored: tuple[Operand, Operand],
    values: Operand,
    head_dim: object,
    output: fx.Node,
) -> tuple[Source, Source, Source] | str:
    """Query, key and value, or what is wrong with them."""
    batch, heads, queries, keys = element.sizes
    b, i, j = element.index[0], element.index[-2], element.index[-1]
    if len(element.index) == 3:
        b = axis_of(BATCH, batch)
    feature = (FEATURE, head_dim)
    of_query = [[(b, batch), (element.head, heads), (i, queries), feature]]
    if len(element.index) == 5:
        groups = list(zip(element.index[1:3], element.groups, strict=True))
        of_query.append([(b, batch), *groups, (i, queries), feature])
    width = value_of(output).shape[-1]
    bounds, product = element.bounds, scores.product
    for heads_of_keys in (_heads_of_keys(element), [(element.head, heads)]):
        of_key, of_value = (
            [[(b, batch), head, (j, keys), last] for head in heads_of_keys]
            for last in (feature, (FEATURE, width))
        )
        for left, right in (factored, factored[::-1]):
            query = trace_operand(left, of_query, bounds, product, output)
            key = trace_operand(right, of_key, bounds, product, output)
            if query is not None and key is not None:
                break
        else:
            return "query and key not found"
        value = trace_operand(values, of_value, bounds, output, output, scaled=False)
        if value is None:
            return "value not found"
        if hint(key.shape[1]) == hint(value.shape[1]):
            break  # otherwise both with a head for every query head
    return query, key, value


def _heads_of_keys(element: Element) -> list[Axis]:
    """A head for every query head, or for several; one head for all is broadcast."""
    heads = element.sizes[1]
    found: list[Axis] = [(element.head, heads)]
    if len(element.index) == 5:
        found.append((element.index[1], element.groups[0]))
    elif isinstance(heads, int):
        groups = [size for size in range(2, heads) if heads % size == 0]
        found += [(sympy.floor(element.head / size), heads // size) for size in groups]
    return [*found, (sympy.Integer(0), 1)]


def _unread(product: fx.Node, output: fx.Node, values: Operand, what: str) -> AttentionSite:
    query, key = [x for x in product.all_input_nodes if is_tensor(x)][:2]
    site = AttentionSite(-1, "", output, query, key, values.node, None, False, 1.0)
    site.skip = Skip(SkipReason.SCORES_UNREADABLE, f"{what} ({product.name})")
    return site


def _hidden(problem: UnreadableScores, output: fx.Node, values: Operand) -> AttentionSite | None:
    """Attention whose scores go through a step that is not read: left alone, but not unseen."""
    node = problem.node
    for _ in range(STEPS):
        if is_contraction(node):
            site = _unread(node, output, values, "")
            site.skip = Skip(SkipReason.SCORES_UNREADABLE, str(problem))
            return site
        scored = [s for s in node.all_input_nodes if is_tensor(s) and is_scores(s)]
        if not scored:
            return None
        node = scored[0]
    return None


def _changed_in_place(softmax: fx.Node, scores: Scores, output: fx.Node) -> fx.Node | None:
    """A change to the scores, or to the masks after they were used, that the reading missed."""
    changes = [c for node in scores.chain for c in changes_of(node) if c < softmax]
    return next((change for change in changes if change not in scores.chain), None)
