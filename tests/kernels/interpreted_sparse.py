"""The sparse prefills' Triton kernels through Triton's interpreter; see interpreted.py."""

from dataclasses import replace

import pytest
import torch

from fluxcompile.kernels.block_sparse.triton import Config as BlockConfig
from fluxcompile.kernels.streaming.triton import Config
from fluxcompile.kernels.xattention.triton import Config as ScoreConfig

from . import cases, sparse_cases, sparse_checks
from .interpreted import small

TILES = {
    "triangle": Config(16, 16, 4, 1),
    "block_sparse": BlockConfig(16, 16, 4, 1),
    "power": BlockConfig(16, 16, 4, 1),
    "xattention": (ScoreConfig(16, 16, 4, 1), BlockConfig(16, 16, 4, 1)),
}


# Masks with holes are served without Triton; the rest of the situations differ little from these.
SITUATIONS = (
    "300", "groups-3", "mixed-both", "mixed-empty", "softcap", "window-small-both", "chunk-one",
    "static-cache-odd",
)  # fmt: skip


def shrunk(mode: str) -> list[sparse_cases.SparseCase]:
    """The mode's cases, as small as :func:`interpreted.small` makes them."""
    situations = sparse_cases.named(mode, *SITUATIONS)
    return [replace(small(c), block=min(c.block, 32)) for c in situations]


@pytest.mark.parametrize("case", shrunk("triangle"), ids=cases.name)
def test_triangle(case):
    sparse_checks.check(case, torch.float32, "cpu", TILES["triangle"])


@pytest.mark.parametrize("case", shrunk("block_sparse"), ids=cases.name)
def test_block_sparse(case):
    sparse_checks.check(case, torch.float32, "cpu", TILES["block_sparse"])


def test_block_sparse_shared_mask():
    case = replace(small(sparse_cases.SHARED), heads=2)
    sparse_checks.check(case, torch.float32, "cpu", TILES["block_sparse"])


@pytest.mark.parametrize("case", shrunk("xattention"), ids=cases.name)
def test_xattention_choice(case):
    sparse_checks.check_choice(case, "cpu", ScoreConfig(16, 16, 4, 1))


def test_xattention_choice_in_slabs():
    for stride in (2, 16):
        (case,) = sparse_cases.named("xattention", "mixed-both")
        case = replace(small(case), stride=stride)
        sparse_checks.check_choice(case, "cpu", ScoreConfig(16, 32, 4, 1), slab=200)


@pytest.mark.parametrize("mode", ["block_sparse", "power", "triangle", "xattention"])
def test_half_of_every_mode(mode):
    (case,) = sparse_cases.named(mode, "mixed-both")
    sparse_checks.check(small(case), torch.float16, "cpu", TILES[mode])
