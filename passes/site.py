"""What the passes know of one attention: the record that travels from stage to stage."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import sympy
from torch import fx

from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.kernels.validation import MAX_DECODE_QUERIES
from fluxcompile.passes.graph_util import as_expr, value_of


class SkipReason(enum.Enum):
    """Why an attention (or a part of its rewrite) was left alone. The value is what users read."""

    GRADIENTS = "gradients are enabled"
    DROPOUT = "attention dropout is active"
    SHAPES = "query, key and value are not [batch, heads, tokens, head_dim]"
    DTYPES = "query, key, value and output are not of one dtype that the kernels take"
    NOT_CAUSAL = "attention is not causal (cross or bidirectional attention)"
    MASK_UNREADABLE = "the mask is not causal + valid keys (+ sliding window)"
    SCORES_UNREADABLE = "the scores are not scale, softcap and an added mask on query times key"
    SCALE_UNREADABLE = "the softmax scale is not a constant"
    WEIGHTS_RETURNED = "the attention probabilities are used elsewhere"
    QUERY_NOT_FOUND = "the query before rotary embedding was not found"
    CACHE_UNKNOWN = "the key/value cache is of an unknown kind"
    CACHE_IN_TRAINING = "training wants whole prompts without a cache (use_cache=False)"
    SLIDING_CACHE = "the sliding-window cache has dropped the sink tokens"
    HEADS_ELSEWHERE = "other processes hold some of the heads that the router reads"
    NO_ROUTER = "no router is attached and no static routes are given"
    NO_ROUTER_FOR_LAYER = "the router has no entry for this layer"
    WINDOW_WITHIN_LOCAL = "the layer's own window is no wider than the local window"


@dataclass(frozen=True)
class Skip:
    """One reason, with what was seen."""

    reason: SkipReason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


class CacheKind(enum.Enum):
    """Where the keys come from."""

    NONE = "none"
    DYNAMIC_NEW = "dynamic, empty"
    DYNAMIC = "dynamic"
    STATIC_NEW = "static, new"
    STATIC = "static"
    RING = "ring"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class CausalMask:
    """Causal, and keys that are valid, and perhaps a sliding window.

    Query ``i`` sits at key index ``offset + i``. ``offset`` is a sympy expression over size
    symbols and 0-d tensors (``scalars`` maps those symbols to nodes), or None when it is proven to
    be ``Skv - Sq`` (lower-right aligned). ``valid`` is a bool node ``[B, L]`` read at
    ``valid_offset + j`` for key ``j``, or None when every key is valid. ``window`` is 0 without
    a sliding window, otherwise a query sees keys ``j > offset + i - window``.
    """

    offset: sympy.Expr | None = None
    window: int = 0
    valid: fx.Node | None = None
    valid_offset: sympy.Expr = sympy.S.Zero
    scalars: tuple[tuple[sympy.Symbol, fx.Node], ...] = ()

    def __str__(self) -> str:
        parts = ["causal"]
        if self.valid is not None:
            parts.append("valid keys")
        if self.window:
            parts.append(f"window {self.window}")
        return " + ".join(parts)


class MaskUse(enum.Enum):
    """What a mask does to the scores."""

    KEEPS = "keeps"  #: as SDPA takes it: bool, True to see; or added
    ADDED = "added"
    BLOCKS = "blocks"  #: bool, True to not see


@dataclass(frozen=True)
class MaskTerm:
    """One mask of several that all hold, and the index it is read at for an element of the scores.

    The index is one of ``passes/axes.py``.
    """

    node: fx.Node
    index: tuple[sympy.Expr, ...]
    use: MaskUse
    bounds: tuple[tuple[sympy.Symbol, int], ...] = ()  #: sizes of the axes, where they are known


class OutputForm(enum.Enum):
    """Axes of an attention's output: b batch, h heads (k groups of g), i queries, d features."""

    BHID = "bhid"
    BIHD = "bihd"
    FLAT = "(bh)id"
    BKGID = "bkgid"
    BIKGD = "bikgd"


@dataclass(frozen=True)
class GivenMask:
    """A ready-made bool mask ``[B or 1, 1, Sq, Skv]`` whose structure is checked at run time."""

    node: fx.Node

    def __str__(self) -> str:
        return "given, checked at run time"


Mask = CausalMask | GivenMask


@dataclass(frozen=True)
class RingKV:
    """The inputs that hold a layer's rings, and what this call adds to them.

    Attributes:
        keys, values: rings ``[B, HK, slots, D]``.
        new_keys, new_values: ``[B, HK, Sq, D]``.
        counts: int64 ``[B]``, valid tokens before this call; negative: not known.
        seen: int64 ``[]``, all tokens before this call; None where that is ``Skv - Sq``.
    """

    keys: fx.Node
    values: fx.Node
    new_keys: fx.Node
    new_values: fx.Node
    counts: fx.Node
    seen: fx.Node | None
    pattern: RingPattern

    @property
    def is_whole(self) -> bool:
        """True where every token is kept, False where only sink and local are. May add a guard."""
        slots = self.keys.meta["example_value"].shape[2]
        return self.pattern.room > 0 and bool(slots == self.pattern.whole_slots)

    @property
    def slots(self) -> sympy.Expr:
        return as_expr(self.keys.meta["example_value"].shape[2])


@dataclass(frozen=True)
class Source:
    """A tensor that holds a query, a key or a value: ``node.permute(order)`` times ``scale``.

    ``order`` is that of ``[B, heads, tokens, head_dim]``; of five axes, that of
    ``[B, KV heads, group, tokens, head_dim]``, whose heads are to be merged.
    """

    node: fx.Node
    order: tuple[int, ...]
    scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        return self.order == (0, 1, 2, 3)

    @property
    def shape(self) -> tuple:
        """Of ``[B, heads, tokens, head_dim]``."""
        sizes = [value_of(self.node).shape[axis] for axis in self.order]
        if len(sizes) == 5:
            sizes[1:3] = [sizes[1] * sizes[2]]
        return tuple(sizes)


@dataclass(frozen=True)
class AllTokens:
    """Query and output of an attention for all tokens of the call."""

    q: fx.Node
    output: fx.Node


@dataclass
class AttentionSite:
    """One attention of the graph, and everything the later stages need to rewrite it.

    ``output`` is the node whose value is ``[B, H, Sq, D]``, or has those axes as ``output_form``
    says; ``q`` is ``[B, H, Sq, D]``; ``k`` and ``v`` are ``[B, HK, Skv, D]``, before they are
    expanded to all query heads once ``recover_kv`` has run. Until ``arrange_operands`` has run,
    those in ``sources`` may be other tensors, which hold them.
    """

    index: int
    path: str
    output: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    attn_mask: fx.Node | None
    is_causal: bool
    scale: float
    softcap: float = 0.0
    #: the masks that make up ``attn_mask``, which is the last of them in the graph
    mask_terms: tuple[MaskTerm, ...] = ()
    output_form: OutputForm = OutputForm.BHID
    #: set where ``q`` and ``output`` are of the last token only: what they were before
    all_tokens: AllTokens | None = None
    #: role (q, k, v): the tensor that holds it, with its axes in another order
    sources: dict[str, Source] = field(default_factory=dict)
    #: query before rotary embedding, after q_norm, and the permutation that makes it [B, H, S, D]
    query_tap: fx.Node | None = None
    tap_axes: tuple[int, ...] = (0, 1, 2, 3)
    mask: Mask | None = None
    cache: CacheKind = CacheKind.NONE
    #: graph input that holds the past keys (dynamic) or the key buffer (static)
    past_key: fx.Node | None = None
    #: the growing cache keeps only the latest of the keys that this call reads
    forgets: bool = False
    #: graph input, an int: the tokens that a growing cache has seen, with those it has dropped
    past_length: fx.Node | None = None
    #: the static key buffer, where the attention reads only a slice of it
    key_buffer: fx.Node | None = None
    #: the marker of a growing cache that may become a ring after this call
    marker: fx.Node | None = None
    #: its layer may then be trimmed, in rows that are sparse
    may_trim: bool = False
    #: set where rows may be sparse and the layer is yet not to be trimmed
    not_trimmed: str = ""
    #: bool [B, Skv]: the keys' validity for whoever makes the ring, None for all valid
    key_valid: fx.Node | None = None
    #: this call's cache, where it is one of rings
    ring: RingKV | None = None
    #: int64 [Sq], the cache slots that this call writes (static caches)
    write_positions: fx.Node | None = None
    #: names of the process groups that the layer's heads are spread over
    head_groups: tuple[str, ...] = ()
    #: graph input: the weight nearest to the query, which tells the layer
    weight: fx.Node | None = None
    #: the router's layer, or the site's own order for static routes
    layer: int | None = None
    #: set when nothing may be rewritten
    skip: Skip | None = None
    #: set when the site is rewritten to full attention only, and why it is not routed
    not_routed: Skip | None = None
    became: str = "untouched"
    notes: list[str] = field(default_factory=list)

    @property
    def q_shape(self) -> tuple:
        """Of all the call's queries, also where ``q`` is the last of them."""
        query = self.q if self.all_tokens is None else self.all_tokens.q
        return tuple(query.meta["example_value"].shape)

    @property
    def k_shape(self) -> tuple:
        return tuple(self.k.meta["example_value"].shape)

    @property
    def has_past(self) -> bool:
        return self.cache in (CacheKind.DYNAMIC, CacheKind.STATIC, CacheKind.RING)

    @property
    def window(self) -> int:
        """The layer's own sliding window in keys, 0 for none."""
        return self.mask.window if isinstance(self.mask, CausalMask) else 0

    @property
    def may_start_prompt(self) -> bool:
        """True where this call may be the first of a prompt."""
        return not self.has_past or (self.cache is CacheKind.STATIC and not self.is_decode)

    @property
    def is_decode(self) -> bool:
        """A few query tokens on top of a cache: no host decision, device-side routes.

        Several tokens on a static cache may be a prompt's first, and what a given mask lets them
        see of each other is known only at run time: both are prefills.
        """
        alone = self.cache is CacheKind.STATIC or isinstance(self.mask, GivenMask)
        queries = as_expr(self.q_shape[2])
        most = 1 if alone else MAX_DECODE_QUERIES
        return self.has_past and queries.is_Integer and bool(queries <= most)
