"""What fixed routes cost on some batches, from the graph that trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training.chunked_loss import Targets
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.objective import row_means, shortfall
from fluxcompile.training.patterns import pinning_noise

#: of routes, one 0 or 1 (full attention) a layer
Cost = Callable[[Sequence[int]], float]


@torch.no_grad()
def route_cost(
    router: FluxRouter,
    language_model: LanguageModel,
    run: Callable[..., Any],
    batches: Iterable[Mapping[str, torch.Tensor]],
    logits_chunk: int,
) -> Cost:
    """How far the targets are from certain, mean of rows, as a function of routes.

    A row counts its :func:`shortfall`. A divergence from full attention's predictions has no bound,
    so that a few rows decide a search by it, and it holds it against routes that they predict an
    answer better than full attention.

    Args:
        router: attached to the model; what it decides does not matter.
        language_model: of that model.
        run: ``language_model.body`` compiled in training mode with ``router``.
        batches: each with ``input_ids``, ``attention_mask`` and ``labels``, ``[B, S]``, and maybe
            ``prompt_length`` ``[B]``.
        logits_chunk: target tokens whose logits exist at one time.
    """
    device = next(router.parameters()).device
    prepared = []
    for batch in batches:
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        targets = Targets.of(batch["labels"].to(device))
        prepared.append((ids, mask, targets, batch.get("prompt_length")))

    @torch.no_grad()
    def cost(routes: Sequence[int]) -> float:
        full, rows = torch.tensor([routes], dtype=torch.bool, device=device), []
        for ids, mask, targets, prompt_length in prepared:
            noise = pinning_noise(full.expand(len(ids), -1))
            with soft_routes(router, noise=noise, prompt_length=prompt_length):
                losses = language_model.losses(run, ids, mask, targets, logits_chunk)
            rows.append(row_means(losses.cross_entropy, targets.rows, len(ids)))
        return float(shortfall(torch.cat(rows).double()).mean())

    return cost
