"""A model, data and arguments so small that a whole training run takes a second or two."""

from typing import Any

import torch

import fluxcompile
from fluxcompile import FluxRouter
from fluxcompile.config import FluxConfig
from fluxcompile.training.backbone import attached
from tests.router_models import tiny_llama

CONFIG = FluxConfig(sink=4, local=8, pool_size=8)
TASKS = ("retrieval", "holistic")

# Six steps of four examples; the compile is Dynamo's graph, rewritten, run as it is.
QUICK: dict[str, Any] = {
    "config": CONFIG,
    "max_steps": 6,
    "batch_size": 4,
    "per_device_train_batch_size": 2,
    "lowering": "eager",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def tiny_model(**overrides: Any) -> torch.nn.Module:
    """The same two-layer Llama every time."""
    torch.manual_seed(0)
    return tiny_llama(**overrides)


def tiny_data(rows: int = 16, tokens_tell_tasks: bool = False) -> list[dict[str, Any]]:
    """Random tokens of slightly differing lengths, tasks in turn.

    With ``tokens_tell_tasks`` each task has half of the vocabulary to itself.
    """
    generator = torch.Generator().manual_seed(1)
    data = []
    for row in range(rows):
        first, last = (
            (3, 61) if not tokens_tell_tasks else (3 + 29 * (row % 2), 32 + 29 * (row % 2))
        )
        tokens = torch.randint(first, last, (40 + row % 5,), generator=generator)
        data.append({"input_ids": tokens.tolist(), "task": TASKS[row % 2]})
    return data


def routes_on(
    model: torch.nn.Module, router: FluxRouter, data: list[dict[str, Any]]
) -> torch.Tensor:
    """bool ``[rows, layers]``, True for full attention, as a user's compile decides."""
    with attached(model, router):
        compiled = torch.compile(model, backend="flux", options={"lowering": "eager"})
        found = []
        for row in data:
            with torch.no_grad():
                compiled(torch.tensor([row["input_ids"]]), use_cache=True)
            found.append(fluxcompile.routes(model).fa[0])
    return torch.stack(found)


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Between two modules' parameters, anywhere."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
