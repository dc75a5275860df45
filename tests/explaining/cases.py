"""A small model with a prompt, and a report written by hand."""

import torch
from torch import nn

from fluxcompile.cache_memory import CacheMemory
from fluxcompile.explaining import LayerTimes, PromptReport
from fluxcompile.report import AttentionReport, FluxReport, GraphReport
from fluxcompile.route_record import Routes
from tests.router_models import tiny_llama

SMALL = {"sink": 3, "local": 9, "pool_size": 4}
LAYERS, ROWS, TOKENS = 4, 3, 100
PATHS = tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))


def model(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=layers).requires_grad_(False)


def prompt() -> dict[str, torch.Tensor]:
    """Three rows, the first of them padded."""
    ids = torch.randint(3, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand() -> PromptReport:
    """Every number in it differs from the others."""
    rows = tuple(
        AttentionReport(
            path, (ROWS, 4, TOKENS + i, 16), (ROWS, 2, TOKENS, 16), "causal + valid keys",
            "dynamic, empty", "routed: full or streaming", None, "",
        )
        for i, path in enumerate(PATHS)
    )  # fmt: skip
    fa = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    return PromptReport(
        FluxReport((GraphReport(rows, 0.1),)),
        Routes(fa, PATHS),
        LayerTimes(
            {path: 0.001 + 0.0003 * i for i, path in enumerate(PATHS)},
            {path: 0.002 + 0.0005 * i for i, path in enumerate(PATHS)},
            "measured with a stopwatch",
        ),
        CacheMemory((3000, 4000, 5000, 6000), (9000, 9100, 9200, 9300), (0, 1)),
        {"model": "tiny", "run": "a test"},
    )
