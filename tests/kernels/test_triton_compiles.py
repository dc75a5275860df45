"""Every shipped Triton configuration compiles for Hopper and fits it; needs no GPU.

The fast subset runs always, the rest with ``--slow``.
"""

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fluxcompile.kernels.decode import triton as decode_triton  # noqa: E402
from fluxcompile.kernels.host_flag import triton as flag_triton  # noqa: E402
from fluxcompile.kernels.launch import Limits  # noqa: E402
from fluxcompile.kernels.project_rows import few_rows, one_row  # noqa: E402
from fluxcompile.kernels.router import triton as router_triton  # noqa: E402
from fluxcompile.kernels.streaming import triton as streaming_triton  # noqa: E402
from fluxcompile.kernels.streaming.backward import triton as backward_triton  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes a program may have on Hopper
FLOATS = ("scale", "score_scale", "cap_scale", "softcap", "threshold", "eps")
TYPES = {
    "p_bounds": "*i32", "p_q_start": "*i32", "p_route": "*u8", "p_valid": "*u8", "p_mask": "*u8",
    "p_list": "*i16", "p_count": "*i32", "p_rows": "*u8", "p_flag": "*u8",
}  # fmt: skip
FAST_GRADIENTS = ((64, "bf16"), (128, "bf16"))  # what a model is trained in
PARTIAL = ("p_part", "p_max", "p_sum", "p_lse", "p_delta")


def compiled(kernel, config, element, constants):
    """``kernel`` compiled for Hopper, with the alignment that real tensors have."""
    names = kernel.arg_names

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in PARTIAL:
            return "*fp32"
        if name.startswith("p_"):
            return TYPES.get(name, f"*{element}")
        return "fp32" if name in FLOATS else "i32"

    aligned = [i for i, name in enumerate(names) if name.startswith(("p_", "stride_"))]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=HOPPER, options=options)


def configurations(table):
    """Parameters of every entry of ``table``."""
    params = []
    for (head_dim, size), config in table.items():
        for element in ("fp32",) if size == 4 else ("bf16", "fp16"):
            fast = (head_dim, element) in ((128, "bf16"), (128, "fp32"))
            marks = () if fast else pytest.mark.slow
            params.append(
                pytest.param(head_dim, element, config, id=f"{head_dim}-{element}", marks=marks)
            )
    return params


@pytest.mark.parametrize("flags", ["streaming", "full", "everything"])
@pytest.mark.parametrize(
    ("head_dim", "element", "config"), configurations(streaming_triton.CONFIGS)
)
def test_prefill_compiles(head_dim, element, config, flags):
    kernel = streaming_triton.attention_kernel
    has = [name for name in kernel.arg_names if name.startswith("HAS_")]
    constants = {
        "HEADS": 32, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": head_dim,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPARSE": flags != "full",
        **dict.fromkeys(has, flags == "everything"),
    }  # fmt: skip
    binary = compiled(kernel, config, element, constants)
    assert binary.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in binary.asm["ptx"]) == (element != "fp32")


@pytest.mark.parametrize("flags", ["streaming", "full", "everything"])
@pytest.mark.parametrize("kernel", ["query", "key"])
@pytest.mark.parametrize(
    ("head_dim", "element"),
    [
        pytest.param(
            head_dim, element, id=f"{head_dim}-{element}",
            marks=() if (head_dim, element) in FAST_GRADIENTS else pytest.mark.slow,
        )
        for head_dim, size in backward_triton.KEY_CONFIGS
        for element in (("fp32",) if size == 4 else ("bf16", "fp16"))
    ],
)  # fmt: skip
def test_gradients_compile(head_dim, element, kernel, flags):
    table = getattr(backward_triton, f"{kernel.upper()}_CONFIGS")
    config = table[head_dim, 4 if element == "fp32" else 2]
    kernel = getattr(backward_triton, f"{kernel}_kernel")
    has = [name for name in kernel.arg_names if name.startswith("HAS_")]
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_D": head_dim,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPARSE": flags != "full",
        **dict.fromkeys(has, flags == "everything"),
    }  # fmt: skip
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    binary = compiled(kernel, config, element, constants)
    assert binary.metadata.shared <= SHARED_MEMORY
    assert ("wgmma" in binary.asm["ptx"]) == (element != "fp32")


# (query heads of one KV head, queries) -> tile rows
TILES = {(4, 1): 16, (4, 3): 16, (8, 8): 64, (12, 8): 64}


@pytest.mark.parametrize(("group", "queries"), TILES)
@pytest.mark.parametrize(("head_dim", "element", "config"), configurations(decode_triton.CONFIGS))
def test_decode_compiles(head_dim, element, config, group, queries):
    rows = decode_triton.tile_rows(group, queries)
    assert rows == TILES[group, queries]
    constants = {
        "KV_HEADS": 8, "GROUP": group, "QUERIES": queries, "HEAD_DIM": head_dim,
        "BLOCK_M": rows, "BLOCK_D": head_dim, "BLOCK_N": config.block_n,
        "HAS_VALID": True, "HAS_ROUTE": True, "HAS_SOFTCAP": False, "OVERLAP": True,
    }  # fmt: skip
    binary = compiled(decode_triton.split_kernel, config, element, constants)
    assert binary.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize(("head_dim", "element", "config"), configurations(decode_triton.CONFIGS))
def test_decode_combine_compiles(head_dim, element, config):
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_S": 64, "OVERLAP": True}
    combine = compiled(decode_triton.combine_kernel, config, element, constants)
    assert combine.metadata.shared <= SHARED_MEMORY


def test_router_compiles():
    config = decode_triton.Config(0, 4, 1)
    sizes = {"HEADS": 32, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_T": 64}
    compiled(router_triton.pool_kernel, config, "bf16", sizes)
    sizes = {"PARTS": 32, "BLOCK_P": 32, "IN": 128, "OUT": 1024, "BLOCK_K": 128, "BLOCK_N": 16}
    compiled(router_triton.linear_kernel, config, "fp32", {**sizes, "ACTIVATED": True})
    compiled(router_triton.decide_kernel, config, "fp32", {"IN": 128, "BLOCK_K": 128})
    compiled(flag_triton.flag_kernel, config, "u8", {"ANY": False, "BLOCK": 32})


ROWS = {"HAS_BIAS": True, "HAS_NORM": True, "HAS_ADDED": True, "GATED": True, "OVERLAP": True}


@pytest.mark.parametrize("element", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inputs", [576, 4096, 14336])
def test_project_one_row_compiles(inputs, element):
    tiles = one_row.choose_config(inputs, gated=True)
    constants = {"IN": inputs, "ROWS": tiles.rows, "COLUMNS": tiles.columns, **ROWS}
    config = decode_triton.Config(0, tiles.num_warps, 1)
    binary = compiled(one_row.one_row_kernel, config, element, constants)
    assert "ld.global.v4" in binary.asm["ptx"], "weights must be read 16 bytes at a time"


# (columns, rows of each matrix, gated) -> rows of a tile, columns a step, warps, stages
FEW_ROWS = {
    (4096, (4096, 1024, 1024), False): (64, 128, 8, 5),
    (4096, (4096,), False): (32, 256, 4, 5),
    (4096, (14336, 14336), True): (64, 128, 8, 4),
    (14336, (4096,), False): (32, 256, 4, 5),
    (576, (1536, 1536), True): (32, 256, 4, 4),
    (2048, (128256,), False): (64, 128, 8, 5),
}


@pytest.mark.parametrize("element", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shapes", FEW_ROWS, ids=str)
def test_project_few_rows_compiles(shapes, element):
    inputs, _, gated = shapes
    tiles = few_rows.choose_config(*shapes)
    assert tiles == few_rows.Config(*FEW_ROWS[shapes])
    constants = {"IN": inputs, "ROWS": tiles.rows, "COLUMNS": tiles.columns, **ROWS}
    constants |= {"BLOCK_M": few_rows.BLOCK_M, "GATED": gated, "SCALE_FIRST": element == "fp16"}
    binary = compiled(few_rows.few_rows_kernel, tiles, element, constants)
    assert binary.metadata.shared <= SHARED_MEMORY
    assert "mma" in binary.asm["ptx"]
    assert "cp.async" in binary.asm["ptx"], "the next columns must be under way"


@pytest.mark.parametrize("kilobytes", [63, 99, 163])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("features", [512, 65536])
def test_few_rows_of_a_small_gpu(features, gated, kilobytes):
    """Fewer columns are under way where a program has less shared memory than on Hopper."""
    room = Limits(multiprocessors=40, shared_memory=kilobytes * 1024)
    tiles = few_rows.choose_config(4096, (features, features), gated, room)
    bytes_a_stage = 2 * tiles.columns * (tiles.rows * (1 + gated) + few_rows.BLOCK_M)
    assert tiles.num_stages >= 1
    assert tiles.num_stages * bytes_a_stage < room.shared_memory
