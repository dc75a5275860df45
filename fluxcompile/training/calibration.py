"""Measure what the routers of a model read, so that they can standardise it.

Queries have a large mean that all prompts share: what tells one prompt from another is small beside
it. A router whose config has ``standardize`` subtracts the mean of its features over a calibration
set and divides by their deviation; both are constants of the router from then on.

The features are those of the model under full attention, which an untrained router chooses.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fluxcompile.errors import TrainingError
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training import backbone
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.patterns import pinning_noise
from fluxcompile.training.processes import summed

#: A deviation is at least this share of the layer's typical one, and of its typical mean: a feature
#: that hardly varies would otherwise turn rounding into a signal.
LEAST_OF_DEVIATION, LEAST_OF_MEAN = 1e-2, 1e-3


def is_calibrated(router: FluxRouter) -> bool:
    """Some layer's mean or deviation has been set."""
    return any(layer.calibrated for layer in router.layers)


def calibrate(
    model: nn.Module,
    router: FluxRouter,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    run: Callable[..., Any] | None = None,
    lowering: str = "inductor",
) -> None:
    """Set every layer's ``feature_mean`` and ``feature_deviation`` from ``batches``.

    Args:
        model: a causal language model, not compiled.
        router: with ``config.standardize``, on the model's device; changed in place.
        batches: what :func:`fluxcompile.training.batching.collate` makes; of these ``input_ids``,
            ``attention_mask`` and, if there, ``prompt_length`` matter. With several processes each
            passes its own, and all get the result over all.
        run: the part of ``model`` with the attentions, compiled in training mode with ``router``;
            None compiles it.
        lowering: as the backend's option, for that.

    Raises:
        RouterError: ``router`` belongs to another model.
        TrainingError: the router does not standardise, or there is no batch.
    """
    if not router.config.standardize:
        raise TrainingError.mismatch("router to calibrate", "FluxConfig.standardize", "False")
    if run is not None:
        moments = _moments(model, router, batches, run)
    else:
        body = LanguageModel.of(model).body
        with backbone.attached(model, router), backbone.frozen(model):
            compiled = backbone.compiled(body, router, lowering=lowering)
            with backbone.compiler_settings(None):
                moments = _moments(model, router, batches, compiled)
    _set(router, moments)


def _moments(
    model: nn.Module,
    router: FluxRouter,
    batches: Iterable[Mapping[str, torch.Tensor]],
    run: Callable[..., Any],
) -> torch.Tensor:
    """Rows, and sums and sums of squares of every feature: fp64 ``[3, L, F]``, over all processes.

    Layers that are never routed have no rows.
    """
    device = next(model.parameters()).device
    layers, size = len(router.layers), router.layers[0].feature_mean.numel()
    moments = torch.zeros(3, layers, size, dtype=torch.float64, device=device)
    for batch in batches:
        everything = torch.ones(len(batch["input_ids"]), layers, dtype=torch.bool)
        for layer, features in read_features(router, batch, run, everything).items():
            wide = features.to(device, torch.float64)
            rows = torch.full_like(wide, 1.0)
            moments[:, layer] += torch.stack((rows, wide, wide.square())).sum(dim=1)
    return summed(moments)


def read_features(
    router: FluxRouter,
    batch: Mapping[str, torch.Tensor],
    run: Callable[..., Any],
    full: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """What each routed layer reads of a batch whose rows take fixed routes, not standardised.

    Args:
        router: standardises.
        batch: as :func:`calibrate` takes it.
        run: as :func:`calibrate` takes it, compiled.
        full: bool ``[B, L]``, True for full attention.

    Returns:
        fp32 ``[B, F]`` by layer.
    """
    device = next(router.parameters()).device
    ids = batch["input_ids"].to(device)
    mask = None if len(ids) == 1 else batch["attention_mask"].to(device)
    noise = pinning_noise(full.to(device))
    prompt_length = batch.get("prompt_length")
    # Under grad mode, although nothing is differentiated: the training step's graph serves here.
    with soft_routes(router, noise=noise, prompt_length=prompt_length) as soft:
        run(ids, attention_mask=mask, use_cache=False)
        return soft.features()


@torch.no_grad()
def _set(router: FluxRouter, moments: torch.Tensor) -> None:
    rows, total, squares = moments
    if not rows.any():
        raise TrainingError.mismatch("calibration", "at least one row", "none")
    for layer, n, s1, s2 in zip(router.layers, rows, total, squares, strict=True):
        if not n.any():
            continue
        mean = s1 / n
        variance = (s2 / n - mean.square()).clamp(min=0)
        typical_deviation, typical_mean = variance.mean().sqrt(), mean.square().mean().sqrt()
        least = LEAST_OF_DEVIATION * typical_deviation + LEAST_OF_MEAN * typical_mean
        deviation = variance.sqrt().clamp(min=least)
        layer.feature_mean.copy_(mean)
        layer.feature_deviation.copy_(torch.where(deviation > 0, deviation, 1.0))
