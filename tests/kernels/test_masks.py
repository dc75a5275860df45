"""Reading key validity and explicit masks."""

import pytest
import torch

from fluxcompile.kernels import ops
from fluxcompile.kernels.masks import key_masks
from fluxcompile.kernels.masks.flags import LONG_ROW


def causal(key_valid, queries, q_start):
    position = q_start + torch.arange(queries)
    before = torch.arange(key_valid.shape[1]) <= position[:, None]
    return (before & key_valid[:, None, :])[:, None]


def test_bounds_of_padded_rows():
    key_valid = torch.ones(4, 9, dtype=torch.bool)
    key_valid[1, :3] = False
    key_valid[2, 7:] = False
    key_valid[3] = False
    bounds, flags = ops.mask_bounds(key_valid)
    assert bounds.tolist() == [[0, 9], [3, 9], [0, 7], [0, 0]]
    assert bounds.dtype == torch.int32
    assert flags.tolist() == [True, True, False, False]


def test_flags_of_holes_and_of_no_padding():
    key_valid = torch.ones(2, 9, dtype=torch.bool)
    assert ops.mask_bounds(key_valid)[1].tolist() == [True, True, True, False]
    key_valid[1, 4] = False
    bounds, flags = ops.mask_bounds(key_valid)
    assert bounds.tolist() == [[0, 9], [0, 9]]
    assert flags.tolist() == [True, False, False, False]


@pytest.mark.parametrize(("valid", "long"), [(LONG_ROW, True), (LONG_ROW - 1, False)])
def test_flag_of_long_rows(valid, long):
    key_valid = torch.ones(2, 200, dtype=torch.bool)
    key_valid[1, valid:] = False
    assert ops.mask_bounds(key_valid)[1].tolist() == [True, True, False, long]


def test_bounds_without_keys():
    bounds, flags = ops.mask_bounds(torch.ones(2, 0, dtype=torch.bool))
    assert bounds.tolist() == [[0, 0], [0, 0]]
    assert flags.tolist() == [True, True, True, False]


@pytest.mark.parametrize(("queries", "q_start"), [(1, 8), (9, 0), (4, 5), (4, 2), (2, 0)])
def test_reads_a_causal_mask(queries, q_start):
    key_valid = torch.ones(2, 9, dtype=torch.bool)
    key_valid[1, :2] = False
    mask = causal(key_valid, queries, q_start)
    got, bounds, flags = ops.read_mask(mask, torch.tensor([q_start], dtype=torch.int32))
    reachable = torch.arange(9) < q_start + queries
    assert torch.equal(got, key_valid & reachable)
    end = min(9, q_start + queries)
    assert bounds.tolist() == [[0, end], [2, end] if end > 2 else [0, 0]]
    assert flags.tolist() == [True, True, False, False]


def test_reads_a_mask_with_holes():
    key_valid = torch.tensor([[True, False, True, True]])
    _, bounds, flags = ops.read_mask(causal(key_valid, 4, 0), torch.zeros(1, dtype=torch.int32))
    assert bounds.tolist() == [[0, 4]]
    assert flags.tolist() == [True, False, False, False]


@pytest.mark.parametrize("entry", [(0, 0), (5, 3), (7, 8), (0, 8)])
def test_one_wrong_entry_is_not_readable(entry, monkeypatch):
    monkeypatch.setattr(key_masks, "_ENTRIES", 20)  # several blocks
    mask = causal(torch.ones(2, 9, dtype=torch.bool), 9, 0)
    mask[1, 0, *entry] ^= True
    _, _, flags = ops.read_mask(mask, torch.zeros(1, dtype=torch.int32))
    assert not flags[0]


def test_a_window_is_not_readable():
    mask = causal(torch.ones(1, 9, dtype=torch.bool), 9, 0)
    mask &= torch.arange(9) > torch.arange(9)[:, None] - 4
    _, _, flags = ops.read_mask(mask, torch.zeros(1, dtype=torch.int32))
    assert not flags[0]


def test_reads_an_expanded_mask():
    mask = causal(torch.ones(1, 9, dtype=torch.bool), 9, 0).expand(3, 1, 9, 9)
    key_valid, bounds, flags = ops.read_mask(mask, torch.zeros(1, dtype=torch.int32))
    assert key_valid.is_contiguous()
    assert bounds.tolist() == [[0, 9]] * 3
    assert flags.tolist() == [True, True, True, False]
