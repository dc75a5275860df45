"""Tell where an attention's keys come from, by dataflow: nowhere, a growing or a fixed cache."""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.passes.graph_util import argument, is_tensor, op_name, same_size, value_of
from fluxcompile.passes.site import AttentionSite, CacheKind, RingKV
from fluxcompile.passes.views import index_symbols, upstream

#: what transformers' sliding caches call the number of tokens they have seen
_SEEN = "cumulative_length"
_ALLOCATES = {"zeros", "empty", "new_zeros", "new_empty", "zeros_like", "empty_like", "full"}


def find_caches(sites: list[AttentionSite]) -> None:
    """Set the fields of a site that tell of its cache. Run after the keys are unexpanded."""
    for site in sites:
        if site.skip is None:
            _classify(site)


def _classify(site: AttentionSite) -> None:
    key = site.k
    if (ring := _rings(site)) is not None:
        site.cache, site.ring, site.past_key = CacheKind.RING, ring, ring.keys
        return
    if op_name(key) in ("cat", "concat", "concatenate"):
        parts, axis = argument(key, 0, "tensors"), argument(key, 1, "dim", 0)
        if len(parts) == 2 and is_tensor(parts[0]) and axis in (2, -2):
            _classify_concatenation(site, parts[0])
            site.marker = _marker(parts[1])
            return
    writes = _writes(key, site)
    if writes:
        site.write_positions = writes[-1].args[2]
        if key.op == "placeholder":
            site.cache, site.past_key = CacheKind.STATIC, key
        elif op_name(key) in _ALLOCATES:
            site.cache = CacheKind.STATIC_NEW
        else:
            site.cache = CacheKind.UNKNOWN
        return
    if (buffer := _buffer_read_from_start(site)) is not None:
        site.cache, site.key_buffer = CacheKind.STATIC_NEW, buffer
        site.past_key = buffer if buffer.op == "placeholder" else None
    elif key.op == "placeholder" or _reads_input_cache(site):
        site.cache = CacheKind.UNKNOWN


def _rings(site: AttentionSite) -> RingKV | None:
    """Legal because the cache's layer names by these operators what its rings hold."""
    key, value = site.k, site.v
    named = torch.ops.flux.ring_cache.default
    if not (key.target is value.target is named and key.args[2:] == value.args[2:]):
        return None
    new_keys, keys, counts, seen, _, code = key.args
    new_values, values = value.args[:2]
    held = (keys, values, counts) if seen is None else (keys, values, counts, seen)
    if any(node.op != "placeholder" for node in held):
        return None
    pattern = RingPattern.of_code(code)
    return RingKV(keys, values, new_keys, new_values, counts, seen, pattern)


def _marker(new_keys: fx.Node) -> fx.Node | None:
    named = torch.ops.flux.growing_cache.default
    return next((user for user in new_keys.users if user.target is named), None)


def _writes(key: fx.Node, site: AttentionSite) -> list[fx.Node]:
    return [user for user in key.users if op_name(user) == "index_copy_" and user < site.output]


def _buffer_read_from_start(site: AttentionSite) -> fx.Node | None:
    """The static buffer whose first slots, as many as there are queries, are the keys.

    So a prompt without padding is written into an empty cache: HF then drops the mask and reads no
    further than the prompt.
    """
    if not same_size(site.q_shape[2], site.k_shape[2]):
        return None
    symbols = index_symbols(4)
    for source, index in upstream(site.k, symbols):
        held = source.op == "placeholder" or op_name(source) in _ALLOCATES
        if held and len(index) == 4 and index[2] == symbols[2] and _writes(source, site):
            return source
    return None


def _classify_concatenation(site: AttentionSite, past: fx.Node) -> None:
    if value_of(past).dim() == 1 and value_of(past).shape[0] == 0:
        site.cache = CacheKind.DYNAMIC_NEW
    elif past.op == "placeholder" and value_of(past).dim() == 4:
        site.cache, site.past_key = CacheKind.DYNAMIC, past
        site.forgets = _keeps_a_slice(site.k)
        site.past_length = _tokens_seen(past)
    else:
        site.cache = CacheKind.UNKNOWN


def _keeps_a_slice(key: fx.Node) -> bool:
    """True where a slice of the keys, not the keys themselves, leaves the graph.

    The mask does not tell: with fixed lengths the window may hold every key that is left.
    """
    output = next(iter(reversed(key.graph.nodes)))
    return any(op_name(user) == "getitem" and output in user.users for user in key.users)


def _tokens_seen(past: fx.Node) -> fx.Node | None:
    """The count that the object which holds the keys keeps beside them, if it is an input."""
    holder, _ = _attribute(past)
    for node in past.graph.nodes:
        if node.op != "placeholder" or holder is None:
            return None
        is_int = isinstance(value_of(node), (int, torch.SymInt))
        if is_int and _attribute(node) == (holder, _SEEN):
            return node
    return None


def _attribute(placeholder: fx.Node) -> tuple[object, str | None]:
    """The object, as Dynamo names it, and its attribute in which an input was found."""
    source = getattr(placeholder, "_dynamo_source", None)
    return getattr(source, "base", None), getattr(source, "member", None)


def _reads_input_cache(site: AttentionSite) -> bool:
    """True where as many keys as the attention reads cannot come from this call's tokens."""
    return not same_size(site.k_shape[2], site.q_shape[2])
