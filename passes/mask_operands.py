"""A recovered mask as the operands that the kernels take, made once and shared by all layers."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from fluxcompile.kernels.decode.bounds import decode_bounds
from fluxcompile.passes.emit import Emitter
from fluxcompile.passes.graph_util import as_expr, same_size, value_of
from fluxcompile.passes.site import AttentionSite, GivenMask


@dataclass(frozen=True)
class MaskOperands:
    """Operands of the prefill kernels; see ``fluxcompile.kernels.ops``. None where not needed."""

    bounds: fx.Node | None = None
    key_valid: fx.Node | None = None
    flags: fx.Node | None = None
    dense_mask: fx.Node | None = None
    q_start: fx.Node | None = None

    @property
    def is_plain_causal(self) -> bool:
        """Lower-right causal over all keys, nothing else."""
        return self.bounds is None and self.q_start is None

    def as_args(self) -> tuple[fx.Node | None, ...]:
        return self.bounds, self.key_valid, self.flags, self.dense_mask, self.q_start


class MaskOperandCache:
    """Emits mask operands at the first attention that needs them; later layers reuse them."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._prefill: dict[tuple, MaskOperands] = {}
        self._decode: dict[tuple, fx.Node] = {}
        self._valid: dict[tuple, fx.Node] = {}
        self._starts: dict[tuple, fx.Node] = {}

    def prefill(self, site: AttentionSite) -> MaskOperands:
        """For the queries that the site's ``q`` holds."""
        whole = self.of_all_tokens(site)
        return whole if site.all_tokens is None else self._last_row(whole, site)

    def of_all_tokens(self, site: AttentionSite) -> MaskOperands:
        """For all the call's queries."""
        sizes = site.q_shape[0], site.q_shape[2], site.k_shape[2]
        key = (site.mask, *map(as_expr, sizes))
        if key not in self._prefill:
            self._prefill[key] = self._emit_prefill(site)
        return self._prefill[key]

    def decode(
        self, site: AttentionSite, sink: int, local: int, sparse: bool
    ) -> tuple[fx.Node, fx.Node | None]:
        """``query_bounds`` and ``key_valid`` of ``flux::decode_attention``."""
        valid = self.key_valid(site)
        # A given mask row says by itself which keys its one query sees.
        q_start = None if isinstance(site.mask, GivenMask) else self._q_start(site)
        window = site.window
        queries = as_expr(site.q_shape[2])
        sizes = as_expr(site.q_shape[0]), queries, as_expr(site.k_shape[2])
        key = (valid, q_start, sink, local, window, sparse, site.forgets, *sizes)
        if key not in self._decode:
            dropped = self._dropped(site) if sparse and site.forgets else None
            pattern = {"sink": sink, "local": local, "window": window, "sparse": sparse}
            with self._emitter.graph.inserting_before(site.output):
                self._decode[key] = self._emitter.call(
                    decode_bounds,
                    (site.k, valid, q_start, dropped),
                    {"queries": self._emitter.size(queries), **pattern},
                )
        return self._decode[key], valid

    def _emit_prefill(self, site: AttentionSite) -> MaskOperands:
        q_start = self._q_start(site)
        emitter = self._emitter
        if isinstance(site.mask, GivenMask):
            with emitter.graph.inserting_before(site.output):
                start = self._start_or_aligned(site, q_start)
                mask = self._batched(site.mask.node, site)
                read = emitter.call(torch.ops.flux.read_mask.default, (mask, start))
                key_valid, bounds, flags = (emitter.item(read, i) for i in range(3))
            return MaskOperands(bounds, key_valid, flags, mask, start)
        valid = self.key_valid(site)
        if valid is None:
            return MaskOperands(q_start=q_start)
        with emitter.graph.inserting_before(site.output):
            made = emitter.call(torch.ops.flux.mask_bounds.default, (valid,))
            bounds, flags = emitter.item(made, 0), emitter.item(made, 1)
        return MaskOperands(bounds, valid, flags, None, q_start)

    def _last_row(self, whole: MaskOperands, site: AttentionSite) -> MaskOperands:
        """What is known of the keys stays: whether a given mask is readable is said by all rows."""
        if whole.q_start is None:
            return whole  # the last query sits at the last key
        emitter = self._emitter
        with emitter.graph.inserting_before(site.output):
            behind = emitter.size(sympy.expand(as_expr(site.q_shape[2]) - 1))
            start = emitter.call(operator.add, (whole.q_start, behind))
            mask = whole.dense_mask
            if mask is not None:
                mask = emitter.item(mask, (slice(None), slice(None), slice(-1, None)))
        return replace(whole, q_start=start, dense_mask=mask)

    def write_start(self, site: AttentionSite) -> fx.Node:
        """int64 [1], the first cache slot that this call writes (static caches)."""
        with self._emitter.after(site.write_positions):
            return self._emitter.item(site.write_positions, slice(0, 1))

    def _start_or_aligned(self, site: AttentionSite, q_start: fx.Node | None) -> fx.Node:
        if q_start is not None:
            return q_start
        offset = as_expr(site.k_shape[2]) - as_expr(site.q_shape[2])
        return self._filled(self._emitter.size(offset), site)

    def _filled(self, size: object, site: AttentionSite) -> fx.Node:
        device = value_of(site.q).device
        return self._emitter.call(
            torch.full, ((1,), size), {"dtype": torch.int32, "device": device}
        )

    def _q_start(self, site: AttentionSite) -> fx.Node | None:
        """int32 [1], the key index of query 0, or None for lower-right alignment."""
        emitter = self._emitter
        if isinstance(site.mask, GivenMask):
            if site.write_positions is None:
                return None
            key = ("positions", site.mask.node)
            if key not in self._starts:
                with emitter.graph.inserting_before(site.output):
                    self._starts[key] = emitter.method("to", self.write_start(site), torch.int32)
            return self._starts[key]
        offset = site.mask.offset
        if offset is None:
            return None
        key = ("offset", offset, site.attn_mask)
        if key not in self._starts:
            # Right behind the mask: a cache's own length changes in place further down.
            with emitter.graph.inserting_before(site.attn_mask.next):
                size = emitter.size_with_scalars(offset, site.mask.scalars)
                if isinstance(size, fx.Node) and site.mask.scalars:
                    flat = emitter.method("reshape", size, 1)
                    self._starts[key] = emitter.method("to", flat, torch.int32)
                else:
                    self._starts[key] = self._filled(size, site)
        return self._starts[key]

    def key_valid(self, site: AttentionSite) -> fx.Node | None:
        """bool [B, Skv]: the keys that the mask's own validity input allows."""
        emitter = self._emitter
        if isinstance(site.mask, GivenMask):
            if site.q_shape[2] != 1:
                return None  # read_mask makes it
            key: tuple = (site.mask.node, as_expr(site.q_shape[0]))
            if key not in self._valid:
                with emitter.graph.inserting_before(site.output):
                    mask = self._batched(site.mask.node, site)
                    last = (slice(None), 0, -1, slice(None))
                    self._valid[key] = emitter.item(mask, last)
            return self._valid[key]
        if site.mask.valid is None:
            return None
        sizes = as_expr(site.q_shape[0]), as_expr(site.k_shape[2])
        key = (site.mask.valid, site.mask.valid_offset, *sizes)
        if key not in self._valid:
            self._valid[key] = self._window_of_valid(site)
        return self._valid[key]

    def _window_of_valid(self, site: AttentionSite) -> fx.Node:
        emitter, mask = self._emitter, site.mask
        valid, offset = mask.valid, mask.valid_offset
        length, keys = value_of(valid).shape[1], site.k_shape[2]
        with emitter.graph.inserting_before(site.attn_mask.next):
            if not (offset == 0 and same_size(length, keys)):
                start = emitter.size(offset)
                stop = emitter.size(sympy.expand(offset + as_expr(keys)))
                valid = emitter.item(valid, (slice(None), slice(start, stop)))
            if not same_size(value_of(mask.valid).shape[0], site.q_shape[0]):
                batch = emitter.size(as_expr(site.q_shape[0]))
                valid = emitter.method("expand", valid, batch, -1)
        return valid

    def _dropped(self, site: AttentionSite) -> fx.Node | None:
        """int64 [B] or [1]: valid tokens that a sliding cache no longer holds."""
        mask = site.mask
        emitter = self._emitter
        if mask.valid is None:
            if site.past_length is None:
                return None
            seen = as_expr(site.past_length) + as_expr(site.q_shape[2])
            with emitter.graph.inserting_before(site.output):
                gone = emitter.size(sympy.expand(seen - as_expr(site.k_shape[2])))
                return self._filled(gone, site)
        if mask.valid_offset == 0:
            return None
        with emitter.graph.inserting_before(site.output):
            stop = emitter.size(mask.valid_offset)
            gone = emitter.item(mask.valid, (slice(None), slice(0, stop)))
            return emitter.method("sum", gone, -1)

    def _batched(self, mask: fx.Node, site: AttentionSite) -> fx.Node:
        if same_size(value_of(mask).shape[0], site.q_shape[0]):
            return mask
        batch = self._emitter.size(as_expr(site.q_shape[0]))
        return self._emitter.method("expand", mask, batch, -1, -1, -1)
