"""Where a training run starts: routers that already take good fixed routes for each task.

Trained from full attention, all layers are sampled at once and each one's worth is hidden in the
noise of the others. A search, one layer at a time, has no such noise, but its routes are the same
for every prompt. So routes are searched for each task by itself, and the routers learn to take
those of the task that a prompt is of, which what they read of it has to tell them. Training goes
on from there.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fluxcompile.errors import ConfigError
from fluxcompile.layer_router import standardized
from fluxcompile.router import FluxRouter
from fluxcompile.training.route_search import Routes, Sample, mean_of, searched

GREEDY = "greedy"
_LOGIT = 3.0  # what an imitated route is taught as: sure, but training can still change it
# Deviations of noise on what is read. Questions lie close together, other texts do not: with much
# noise whatever is new is taken for a question.
_JITTER = 0.1
_STEPS = 400
_LEARNING_RATE, _DECAY = 1e-3, 0.1

logger = logging.getLogger(__name__)


def check_start(
    start: str | Mapping[str, Sequence[int]] | None, tasks: Iterable[str], layers: int
) -> None:
    """Refuse impossible routes before anything takes time.

    Args:
        start: as :class:`fluxcompile.training.RouterTrainingArguments` takes it.
        tasks: names of those in the data.
        layers: of the model.

    Raises:
        ConfigError: routes for other tasks, or not one 0 or 1 a layer.
    """
    if not isinstance(start, Mapping):
        return
    if set(start) != set(tasks):
        raise ConfigError.mismatch("start", f"routes for {sorted(tasks)}", sorted(start))
    for task, routes in start.items():
        if len(routes) != layers or not set(routes) <= {0, 1}:
            raise ConfigError.mismatch(f"start of {task!r}", f"{layers} of 0 and 1", list(routes))


def start_routes(
    start: str | Mapping[str, Sequence[int]],
    targets: Mapping[str, float],
    layers: int,
    samples: Mapping[str, Sequence[Sample]],
) -> dict[str, Routes]:
    """The routes that each task starts with, 1 for full attention.

    Args:
        start: ``"greedy"``, or the routes themselves by task, as :func:`check_start` lets pass.
        targets: of every task, the share of layers to make sparse.
        layers: of the model.
        samples: of every task, what routes cost on ever more examples: on the first for greedy
            search, on the others for exchanges after it.
    """
    if start == GREEDY:
        return {task: _searched(task, samples[task], layers, t) for task, t in targets.items()}
    return {task: tuple(map(int, start[task])) for task in targets}


def _searched(task: str, samples: Sequence[Sample], layers: int, target: float) -> Routes:
    greedy, found = searched(samples, layers, round(target * layers))
    for name, routes in (("greedy", greedy), ("exchanged", found)):
        words = ",".join(map(str, routes)), mean_of(samples[-1])(routes)
        logger.info("start routes of %s, %s: %s, cost %.5f", task, name, *words)
    return found


def imitate(
    router: FluxRouter, features: Mapping[int, torch.Tensor], full: torch.Tensor, seed: int = 0
) -> float:
    """Teach every layer's router to take given routes, from nothing but what it has read.

    Args:
        router: standardises its features, and has been calibrated; changed in place.
        features: fp32 ``[N, F]`` of each routed layer, before standardising, on its device.
        full: bool ``[N, L]``, True where full attention is wanted.
        seed: of the noise that is added to the features.

    Returns:
        Share of the routes that it now takes as wanted, of those it was taught.
    """
    device = next(router.parameters()).device
    layers = {i: router.layers[i] for i in features}
    wanted = {i: full[:, i].to(device, torch.float32) for i in layers}
    read = {
        i: standardized(features[i].to(device), layer.feature_mean, layer.feature_deviation)
        for i, layer in layers.items()
    }
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_DECAY)
    sure = torch.sigmoid(torch.tensor(_LOGIT)).item()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.enable_grad():
        for _ in range(_STEPS):
            loss = torch.zeros((), device=device)
            for i, layer in layers.items():
                noise = torch.randn(read[i].shape, generator=generator, device=device)
                logits = _decide(layer, read[i] + _JITTER * noise)
                target = wanted[i] * sure + (1 - wanted[i]) * (1 - sure)
                loss = loss + binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        right = [((_decide(layer, read[i]) > 0) == wanted[i].bool()) for i, layer in layers.items()]
    return float(torch.stack(right).float().mean())


def _decide(layer: torch.nn.Module, read: torch.Tensor) -> torch.Tensor:
    """Logit of full attention over sparse, fp32 ``[N]``, from standardised features."""
    logits = layer.head(layer.encoder(read))
    return logits[:, 1] - logits[:, 0]
