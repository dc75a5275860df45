"""The sparse prefills' Triton kernels through Triton's interpreter; see interpreted.py."""

from dataclasses import replace

import pytest
import torch

from fluxcompile.kernels.block_sparse.triton import Config as BlockConfig
from fluxcompile.kernels.streaming.triton import Config

from . import cases, sparse_cases, sparse_checks
from .interpreted import small

TILES = Config(16, 16, 4, 1)


def shrunk(mode: str) -> list[sparse_cases.SparseCase]:
    """The mode's cases that kernels serve, as small as :func:`interpreted.small` makes them."""
    situations = [c for c in sparse_cases.named(mode) if c.padding != "holes"]
    return [replace(small(c), block=min(c.block, 32)) for c in situations]


@pytest.mark.parametrize("case", shrunk("triangle"), ids=cases.name)
def test_triangle(case):
    sparse_checks.check(case, torch.float32, "cpu", TILES)


@pytest.mark.parametrize("case", shrunk("block_sparse"), ids=cases.name)
def test_block_sparse(case):
    sparse_checks.check(case, torch.float32, "cpu", BlockConfig(16, 16, 4, 1))


def test_block_sparse_shared_mask():
    case = replace(small(sparse_cases.SHARED), heads=2)
    sparse_checks.check(case, torch.float32, "cpu", BlockConfig(16, 16, 4, 1))


@pytest.mark.parametrize("mode", ["block_sparse", "power", "triangle"])
def test_half_of_every_mode(mode):
    (case,) = sparse_cases.named(mode, "mixed-both")
    tiles = TILES if mode == "triangle" else BlockConfig(16, 16, 4, 1)
    sparse_checks.check(small(case), torch.float16, "cpu", tiles)
