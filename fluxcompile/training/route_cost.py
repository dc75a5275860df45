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
from fluxcompile.training.route_search import Routes, Sample, samples_of


@torch.no_grad()
def route_samples(
    router: FluxRouter,
    language_model: LanguageModel,
    run: Callable[..., Any],
    batches: Iterable[Mapping[str, torch.Tensor]],
    logits_chunk: int,
    parts: Sequence[int],
) -> list[Sample]:
    """How far each row's targets are from certain, as functions of routes.

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
        parts: for each function, which of the batches it runs, one in so many.
    """
    device = next(router.parameters()).device
    prepared = []
    for batch in batches:
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        targets = Targets.of(batch["labels"].to(device))
        prepared.append((ids, mask, targets, batch.get("prompt_length")))

    @torch.no_grad()
    def shortfalls(routes: Routes, i_batch: int) -> torch.Tensor:
        ids, mask, targets, prompt_length = prepared[i_batch]
        full = torch.tensor([routes], dtype=torch.bool, device=device)
        noise = pinning_noise(full.expand(len(ids), -1))
        with soft_routes(router, noise=noise, prompt_length=prompt_length):
            losses = language_model.losses(run, ids, mask, targets, logits_chunk)
        return shortfall(row_means(losses.cross_entropy, targets.rows, len(ids)).double())

    return samples_of(shortfalls, len(prepared), parts)
