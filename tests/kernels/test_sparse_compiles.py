"""The sparse prefills' Triton kernels compile for Hopper and fit it; needs no GPU."""

import pytest

pytest.importorskip("triton")

from fluxcompile.kernels.block_sparse import triton as block_sparse_triton
from fluxcompile.kernels.xattention import triton as xattention_triton

from .test_triton_compiles import SHARED_MEMORY, compiled, configurations

HAS = ("HAS_BOUNDS", "HAS_Q_START", "HAS_WINDOW", "HAS_SOFTCAP")


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("head_dim", "element", "config"), configurations(block_sparse_triton.CONFIGS)
)
def test_block_sparse_compiles(head_dim, element, config, block):
    config = config.within(block)
    constants = {
        "HEADS": 32, "GROUP": 4, "MASK_HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_D": head_dim,
        "BLOCK": block, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        **dict.fromkeys(HAS, block == 64),
    }  # fmt: skip
    binary = compiled(block_sparse_triton.attention_kernel, config, element, constants)
    assert binary.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in binary.asm["ptx"]) == (element != "fp32")


@pytest.mark.parametrize("flags", [False, True])
def test_list_compiles(flags):
    has = ("HAS_BOUNDS", "HAS_Q_START", "HAS_ROUTE", "HAS_WINDOW")
    constants = {"MASK_HEADS": 32, "BLOCK": 128, "BLOCK_J": 1024, **dict.fromkeys(has, flags)}
    config = block_sparse_triton.CONFIGS[128, 2]
    binary = compiled(block_sparse_triton.list_kernel, config, "bf16", constants)
    assert binary.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "element", "config"), configurations(xattention_triton.CONFIGS)
)
def test_xattention_compiles(head_dim, element, config, flags):
    shared = {
        "HEADS": 32, "STRIDE": 16, "PER_BLOCK": 8,
        **dict.fromkeys(("HAS_BOUNDS", "HAS_Q_START", "HAS_ROUTE", "HAS_WINDOW"), flags),
    }  # fmt: skip
    tiles = {"BLOCK_A": config.block_a, "BLOCK_C": config.block_c}
    sizes = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, **tiles}
    binary = compiled(xattention_triton.score_kernel, config, element, shared | sizes)
    assert binary.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in binary.asm["ptx"]) == (element != "fp32")
    compiled(xattention_triton.choose_kernel, config, element, shared | {"BLOCK_J": 1024})
