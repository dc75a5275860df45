"""Comparisons of results that were written down by hand."""

import math

import pytest
import torch

from fluxcompile.errors import DataError
from fluxcompile.evaluation.compare import (
    certainty,
    context_awareness,
    judged,
    omega,
    quality,
    quality_difference,
    relative,
    relative_difference,
)
from fluxcompile.evaluation.evaluate import CellResult
from fluxcompile.evaluation.prompts import Cell

NEEDLE, HOPS, CODE = Cell("needle", 4096), Cell("two_hop", 4096), Cell("code", 4096)


def result(cell, values, sparse):
    """``sparse`` of four layers are sparse in every prompt."""
    full = (torch.arange(4) >= sparse).expand(len(values), 4)
    values = torch.tensor(values, dtype=torch.float64)
    if cell.metric == "loss":
        return CellResult(cell, values, torch.zeros(len(values), dtype=torch.bool), full)
    return CellResult(cell, torch.zeros_like(values), values.bool(), full)


def results(needle, hops, code, sparse=(0, 0, 0)):
    pairs = zip((NEEDLE, HOPS, CODE), (needle, hops, code), sparse, strict=True)
    return {cell: result(cell, values, n) for cell, values, n in pairs}


FULL = results([1, 1, 1, 1], [1, 0, 0, 1], [2.0, 2.0, 2.0, 2.0])
OURS = results([1, 1, 1, 0], [1, 0, 0, 1], [2.0, 2.0, 2.0, 4.0], sparse=(1, 2, 4))


def test_omega_weighs_kinds_alike():
    assert omega(OURS, [NEEDLE]) == pytest.approx(0.25)
    assert omega(OURS) == pytest.approx(((0.25 + 0.5) / 2 + 1) / 2)
    assert context_awareness(OURS, 4096) == pytest.approx(1 - 0.375)
    with pytest.raises(DataError, match="2048"):
        context_awareness(OURS, 2048)


def test_relative_to_full():
    assert relative(OURS, FULL, [NEEDLE]).value == pytest.approx(0.75)
    assert relative(OURS, FULL, [NEEDLE, HOPS]).value == pytest.approx((0.75 + 0.5) / 1.5)
    found = relative(OURS, FULL, [CODE])
    assert found.value == pytest.approx(1.25)
    assert found.low == 1
    assert 1.25 < found.high <= 2
    with pytest.raises(DataError, match="one metric"):
        relative(OURS, FULL, [NEEDLE, CODE])
    with pytest.raises(DataError, match="none"):
        relative(OURS, FULL, [])


def test_relative_difference_is_taken_prompt_by_prompt():
    assert relative_difference(OURS, OURS, FULL, [CODE]) == (0, 0, 0)
    found = relative_difference(FULL, OURS, FULL, [NEEDLE, HOPS])
    assert found.value == pytest.approx(0.25 / 1.5)
    assert found.low == 0 < found.high
    assert relative_difference(OURS, FULL, FULL, [CODE]).value == pytest.approx(0.25)
    with pytest.raises(DataError, match="one metric"):
        relative_difference(OURS, FULL, FULL, [NEEDLE, CODE])


def test_certainty_in_the_place_of_accuracy():
    sure = result(HOPS, [1, 1], 0)
    unsure = CellResult(HOPS, torch.tensor([0.0, 1.0]).double(), sure.exact, sure.full)
    ours, full = {HOPS: unsure, CODE: OURS[CODE]}, {HOPS: sure, CODE: FULL[CODE]}
    share = (1 + math.exp(-1)) / 2
    assert relative(ours, full, [HOPS]).value == 1
    assert relative(ours, full, [HOPS], certainty).value == pytest.approx(share)
    found = quality_difference(full, ours, full, by=certainty)
    assert found.value == pytest.approx((1 - share + 1 - 2 / 2.5) / 2), "the loss stays the loss"


def test_quality_is_the_mean_share_of_what_full_attention_has():
    assert quality(FULL, FULL) == (1, 1, 1)
    assert quality(OURS, FULL).value == pytest.approx(((0.75 + 1) / 2 + 2 / 2.5) / 2)


def test_cells_that_full_attention_fails_are_not_judged():
    full = FULL | {HOPS: result(HOPS, [0, 0, 0, 0], 0)}
    assert judged(full) == [NEEDLE, CODE]
    assert quality(OURS, full).value == pytest.approx((0.75 + 2 / 2.5) / 2)


def test_difference_is_taken_prompt_by_prompt():
    assert quality_difference(OURS, OURS, FULL) == (0, 0, 0)
    found = quality_difference(FULL, OURS, FULL)
    assert found.value == pytest.approx(1 - quality(OURS, FULL).value)
    assert found.low == 0
