"""What fixed routes cost on some batches, from the graph that trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training.chunked_loss import Targets
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.objective import row_means
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
    certainty: float = 0.0,
) -> Cost:
    """How far predictions diverge from full attention's, mean of rows, as a function of routes.

    Args:
        router: attached to the model; what it decides does not matter.
        language_model: its body, not compiled, is full attention.
        run: ``language_model.body`` compiled in training mode with ``router``.
        batches: each with ``input_ids``, ``attention_mask`` and ``labels``, ``[B, S]``, and maybe
            ``prompt_length`` ``[B]``.
        logits_chunk: target tokens whose logits exist at one time.
        certainty: how far the divergence at a token is multiplied by the probability that full
            attention gives to it.
    """
    device = next(router.parameters()).device
    prepared = []
    for batch in batches:
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        targets = Targets.of(batch["labels"].to(device))
        teacher = language_model.target_states(language_model.body, ids, mask, targets)
        prepared.append((ids, mask, targets, teacher, batch.get("prompt_length")))

    @torch.no_grad()
    def cost(routes: Sequence[int]) -> float:
        full, rows = torch.tensor([routes], dtype=torch.bool, device=device), []
        for ids, mask, targets, teacher, prompt_length in prepared:
            noise = pinning_noise(full.expand(len(ids), -1))
            with soft_routes(router, noise=noise, prompt_length=prompt_length):
                losses = language_model.losses(run, ids, mask, targets, logits_chunk, teacher)
            rows.append(row_means(losses.weighted(certainty), targets.rows, len(ids)))
        return float(torch.cat(rows).double().mean())

    return cost
