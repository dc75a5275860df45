"""Where a token lies in a ring, worked out on the device and without a sync.

A ring holds one layer's keys (or values) ``[B, HK, slots, D]`` of the tokens that may still be
read. A token's slot follows from its *rank*, its place among the row's valid tokens:

==================  ===========================================================================
``0 … sink - 1``    rank 0 … sink - 1, for good
``… + turn``        the latest ``turn`` ranks: rank r in slot ``sink + (r - sink) % turn``
the last slot       what is not to be kept: tokens that are not valid, overwritten at once
==================  ===========================================================================

A *trimmed* ring's ``turn`` is ``local`` and some to spare, so that a step of several tokens can
write them all before its first query reads, and the latest tokens can be taken back. A *whole* ring
never comes round. Rows have their own ranks, so left padding needs nothing more. The order in a
ring does not matter: positions are in the keys already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RingPattern:
    """What rings keep, in tokens.

    Attributes:
        sink: first valid tokens of a row.
        local: latest valid tokens that a query sees, itself included.
        spare: tokens kept beyond ``local``.
        room: tokens that a whole ring holds; 0 where layers that keep every token grow instead.
    """

    sink: int
    local: int
    spare: int
    room: int = 0

    @property
    def code(self) -> str:
        """The pattern as text, which unlike numbers is the same to Dynamo whatever is dynamic."""
        return f"{self.sink} {self.local} {self.spare} {self.room}"

    @classmethod
    def of_code(cls, code: str) -> RingPattern:
        return cls(*map(int, code.split()))

    @property
    def turn(self) -> int:
        """Ranks after the sinks that a trimmed ring holds."""
        return self.local + self.spare

    @property
    def kept(self) -> int:
        """Tokens that a trimmed ring holds at most."""
        return self.sink + self.turn

    @property
    def slots(self) -> int:
        """Of a trimmed ring."""
        return self.kept + 1

    @property
    def whole_slots(self) -> int:
        """Of a whole ring."""
        return self.room + 1

    def holds(self, queries: int) -> bool:
        """Whether a step may write ``queries`` tokens a row before the first of them reads."""
        return queries <= self.spare + 1


def count_tokens(
    counts: Tensor,
    seen: Tensor | None,
    key_valid: Tensor | None,
    length: int,
    queries: int,
    limited: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks of a step's tokens.

    Args:
        counts: int64 ``[B]``, the valid tokens that the ring was given; negative: not known.
        seen: int64 ``[]``, all tokens before; None for ``length - queries``.
        key_valid: bool ``[B, length]`` by this call's mask; None: every token.
        length: tokens that the mask has.
        queries: Sq, the step's tokens.
        limited: there is no room for more than ``length`` tokens.

    Returns:
        ``past`` int64 ``[B]``, valid tokens before the step; ``rank`` int64 ``[B, Sq]``, that of
        each token or, if it is not valid, of the one before it; ``fresh`` bool ``[B, Sq]``, whether
        it is valid; and bool ``[B]``, whether ring and mask agree and there is room.
    """
    batch, before = counts.shape[0], length - queries
    if key_valid is None:
        told = torch.full_like(counts, before) if seen is None else seen.expand(batch)
        fresh = torch.ones((batch, queries), dtype=torch.bool, device=counts.device)
    elif seen is None:
        told, fresh = key_valid[:, :before].sum(-1), key_valid[:, before:]
    else:
        told, fresh = _read_at(key_valid, seen, queries)
    past = torch.where(counts < 0, told, counts)
    same = past == told
    if limited:
        same = same & (seen + queries <= length)
    return past, past[:, None] + fresh.cumsum(-1) - 1, fresh, same


def _read_at(key_valid: Tensor, seen: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Valid tokens before place ``seen``, int64 ``[B]``, and whether those from there on are.

    By their running total: Inductor for CPUs cannot gather from a bool mask that was padded.
    """
    batch, length = key_valid.shape
    total = key_valid.cumsum(-1)
    place = seen - 1 + torch.arange(queries + 1, device=seen.device)
    through = total.gather(1, place.clamp(0, length - 1).expand(batch, -1))
    through = torch.where(place < 0, 0, through)
    return through[:, 0], through[:, 1:] > through[:, :-1]


def slots_of(rank: Tensor, sink: int, turn: int) -> Tensor:
    """Slots of ``rank``, of the same shape."""
    return torch.where(rank < sink, rank, sink + (rank - sink) % turn)


def slots_to_write(rank: Tensor, fresh: Tensor, sink: int, turn: int) -> Tensor:
    """Slots int64 ``[B, Sq]`` of a step's tokens; the last slot for what is not to be kept: tokens
    that are not valid, and those that the step's own later tokens push out."""
    keep = fresh & ((rank < sink) | (rank > rank[:, -1:] - turn))
    return torch.where(keep, slots_of(rank, sink, turn), sink + turn)


def write_ring_(ring: Tensor, slots: Tensor, new: Tensor) -> None:
    """Put ``new`` ``[B, HK, Sq, D]`` in ``slots`` ``[B, Sq]`` of ``ring``."""
    rows = torch.arange(ring.shape[0], device=ring.device)[:, None]
    ring[rows, :, slots] = new.transpose(1, 2)


def count_written_(counts: Tensor, rank: Tensor) -> None:
    """``counts`` ``[B]`` after a step of tokens with ``rank`` ``[B, Sq]``."""
    counts.copy_(rank[:, -1] + 1)


def count_seen_(seen: Tensor, queries: int) -> None:
    """``seen`` ``[]`` after a step of ``queries`` tokens."""
    seen.add_(queries)


def dense_bounds(rank: Tensor) -> Tensor:
    """All that each query sees of a whole ring: int32 ``[B, Sq, 4]`` as :func:`ring_bounds`."""
    zero = torch.zeros_like(rank)
    return torch.stack((zero, zero, zero, rank + 1), dim=-1).to(torch.int32)


def ring_bounds(rank: Tensor, sink: int, local: int, turn: int) -> Tensor:
    """What each query sees of the ring that holds its own token and no more than ``turn - local``
    later ones, for ``flux::decode_attention``: int32 ``[B, Sq, 4]``.

    The local ranks are a run of slots or, where it passes the ring's end, a run at each end; the
    one at the beginning touches the sinks. So two ranges always do.
    """
    seen = rank + 1
    oldest = (seen - local).clamp(min=sink)
    start, stop = slots_of(oldest, sink, turn), slots_of(rank, sink, turn) + 1
    sinks_only, wraps = seen <= sink, start >= stop
    sink_end = torch.where(sinks_only, seen, torch.where(wraps, stop, sink))
    local_start = torch.where(sinks_only, seen, start)
    end = torch.where(sinks_only, seen, torch.where(wraps, sink + turn, stop))
    bounds = torch.zeros_like(seen), sink_end, local_start, end
    return torch.stack(bounds, dim=-1).to(torch.int32)


def slots_by_age(past: Tensor, sink: int, turn: int) -> tuple[Tensor, Tensor]:
    """Every slot of rings that hold ``past`` ``[B]`` valid tokens, oldest token first.

    Returns:
        slots int64 ``[B, sink + turn]``, and whether there is a token, bool of that shape.
    """
    place = torch.arange(sink + turn, device=past.device)
    rank = torch.where(place < sink, place, past[:, None] - sink - turn + place)
    there = torch.where(place < sink, rank < past[:, None], rank >= sink)
    return torch.where(there, slots_of(rank, sink, turn), 0), there


def unroll(ring: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """``ring`` in the order of ``slots`` ``[B, N]``, then ``new``: ``[B, HK, N + Sq, D]``."""
    return torch.cat((pick(ring, slots), new), dim=2)


def pick(keys: Tensor, index: Tensor) -> Tensor:
    """``keys`` ``[B, HK, T, D]`` at ``index`` ``[B, N]``: ``[B, HK, N, D]``."""
    batch, heads, _, head_dim = keys.shape
    return keys.gather(2, index[:, None, :, None].expand(batch, heads, -1, head_dim))


def tokens_of_slots(
    valid: Tensor | None, counts: Tensor, length: int, slots: int, sink: int
) -> Tensor:
    """Which of ``length`` tokens, in their order, go where in a new ring.

    Args:
        valid: bool ``[B, length]``; None: every token.
        counts: int64 ``[B]``, how many of them are valid.
        slots: of the ring.

    Returns:
        int64 ``[B, slots]``, a token's index for each slot; any, where none belongs.
    """
    last = counts[:, None] - 1
    slot = torch.arange(slots, device=counts.device)
    rank = torch.where(slot < sink, slot, last - (last - slot) % (slots - 1 - sink))
    rank = rank.clamp(min=0).minimum(last.clamp(min=0))
    if valid is None:
        return rank
    seen = valid.to(torch.int32).cumsum(-1)
    index = torch.searchsorted(seen, (rank + 1).to(torch.int32))
    return index.clamp(max=length - 1)
