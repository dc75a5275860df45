"""Where tokens lie in a ring, against a ring kept token by token in plain Python."""

from __future__ import annotations

import pytest
import torch

from fluxcompile.errors import KernelError
from fluxcompile.kernels import ops
from fluxcompile.kernels.decode.reference import visible_keys
from fluxcompile.kernels.ring import layout
from fluxcompile.kernels.ring.layout import RingPattern

PATTERNS = [
    RingPattern(4, 16, 0),
    RingPattern(4, 16, 5),
    RingPattern(1, 1, 0),
    RingPattern(3, 2, 9),
]


def slot_by_hand(rank: int, pattern: RingPattern) -> int:
    if rank < pattern.sink:
        return rank
    return pattern.sink + (rank - pattern.sink) % pattern.turn


def ring_by_hand(valid: list[bool], pattern: RingPattern) -> dict[int, int]:
    """Slot -> index of the token in it."""
    held, rank = {}, 0
    for index, good in enumerate(valid):
        if good:
            held[slot_by_hand(rank, pattern)] = index
            rank += 1
    return held


def some_validity(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """bool [B, length]: left padding of different lengths, and some holes."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, length, generator=generator) > 0.1
    for row in range(batch):
        valid[row, : row * 7] = False
    return valid


@pytest.mark.parametrize("length", [1, 5, 21, 64, 100])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.code)
def test_new_ring(pattern, length):
    valid = some_validity(4, length)
    counts = valid.sum(-1)
    tokens = layout.tokens_of_slots(valid, counts, length, pattern.slots, pattern.sink)
    assert tokens.shape == (4, pattern.slots)
    assert tokens.min() >= 0
    assert tokens.max() < length
    for row in range(4):
        held = ring_by_hand(valid[row].tolist(), pattern)
        assert {slot: tokens[row, slot].item() for slot in held} == held


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.code)
def test_steps_keep_the_ring_and_see_the_window(pattern):
    """Token by token and several at once: slots, and what each query sees of them."""
    length = 90
    valid = some_validity(3, length, seed=1)
    start = 37
    ring = torch.full((3, 1, pattern.slots, 1), -1.0)
    tokens = torch.arange(length, dtype=torch.float32).expand(3, -1)[:, None, :, None]
    counts = valid[:, :start].sum(-1)
    index = layout.tokens_of_slots(valid[:, :start], counts, start, pattern.slots, pattern.sink)
    ring = layout.pick(tokens[:, :, :start], index)
    steps = [1, 1, 3, 1, 8, 1, 2] if pattern.spare >= 7 else [1] * 20
    for queries in steps:
        stop = start + queries
        past, rank, fresh, same = layout.count_tokens(
            counts, None, valid[:, :stop], stop, queries, False
        )
        assert same.all()
        assert past.tolist() == valid[:, :start].sum(-1).tolist()
        slots = layout.slots_to_write(rank, fresh, pattern.sink, pattern.turn)
        layout.write_ring_(ring, slots, tokens[:, :, start:stop])
        bounds = layout.ring_bounds(rank, pattern.sink, pattern.local, pattern.turn)
        seen = visible_keys(bounds, pattern.slots, None, None)
        for row in range(3):
            held = ring_by_hand(valid[row, :stop].tolist(), pattern)
            for query in range(queries):
                read = sorted(ring[row, 0, seen[row, query], 0].tolist())
                assert read == window(valid[row], start + query, pattern)
            assert {s: int(ring[row, 0, s, 0]) for s in held} == held
        layout.count_written_(counts, rank)
        start = stop


def window(valid: torch.Tensor, query: int, pattern: RingPattern) -> list[int]:
    """What the definition lets ``query`` see: first ``sink`` and latest ``local`` valid tokens."""
    good = [i for i in range(query + 1) if valid[i]]
    return sorted({*good[: pattern.sink], *good[-pattern.local :]})


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.code)
def test_oldest_first(pattern):
    past = torch.tensor([0, 2, 5, 21, 64])
    slots, there = layout.slots_by_age(past, pattern.sink, pattern.turn)
    for row, count in enumerate(past.tolist()):
        held = ring_by_hand([True] * count, pattern)
        by_age = [held[slot] for slot in slots[row, there[row]].tolist()]
        assert by_age == sorted(held.values())


def test_more_tokens_than_the_ring_takes():
    """Only what will be there in the end is written: no slot twice, but for the last one."""
    pattern = RingPattern(4, 6, 0)
    fresh = torch.ones(1, 30, dtype=torch.bool)
    rank = torch.arange(2, 32)[None]
    slots = layout.slots_to_write(rank, fresh, pattern.sink, pattern.turn)[0].tolist()
    kept = [slot for slot in slots if slot != pattern.kept]
    assert len(kept) == len(set(kept)) == 2 + pattern.turn  # ranks 2 and 3 are sinks


def test_a_fixed_length_counts_what_has_been_seen():
    valid = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0]]).bool()
    seen, counts = torch.tensor(4), torch.tensor([-1])
    past, rank, fresh, same = layout.count_tokens(counts, seen, valid, 8, 2, True)
    assert (past.tolist(), rank.tolist(), fresh.tolist()) == ([3], [[3, 4]], [[True, True]])
    assert same.all()  # the counts are not known: the mask's are taken
    *_, same = layout.count_tokens(torch.tensor([5]), torch.tensor(7), valid, 8, 1, True)
    assert same.all()
    *_, same = layout.count_tokens(torch.tensor([5]), torch.tensor(7), valid, 8, 2, True)
    assert not same.any()  # no room for the second token


def test_unreadable_outside_of_the_rewrite():
    new, ring = torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 22, 8)
    with pytest.raises(KernelError, match='backend "flux"'):
        ops.ring_cache(new, ring, torch.zeros(2, dtype=torch.int64), None, 50, "4 16 1 0")


def test_disagreement_is_an_error():
    output = torch.zeros(2, 1, 4, 8)
    assert torch.equal(ops.agree(output, torch.tensor([True, True])), output)
    with pytest.raises(KernelError, match="attention_mask"):
        ops.agree(output, torch.tensor([True, False]))
