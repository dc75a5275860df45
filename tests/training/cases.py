"""Tiny frozen models with routers whose shares are neither 0 nor 1, and a loss over both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

import fluxcompile
from fluxcompile import FluxRouter, soft_routes
from tests.parity.models import LOCAL, SINK, Prompt, flux_config, random_router, tiny_model
from tests.training.eager_mixture import Mixture, eager_mixture

SHORT, LONG = SINK + LOCAL - 3, SINK + LOCAL + 21
TEMPERATURE = 1.3


@dataclass(frozen=True)
class Case:
    """A model compiled for training, and its router."""

    model: PreTrainedModel
    router: FluxRouter


def trainable(
    kind: str = "llama", dtype: torch.dtype = torch.float64, overrides: dict | None = None, **config
) -> Case:
    """A frozen model in ``dtype`` and an attached router, not yet compiled."""
    model = tiny_model(kind, **({"head_dim": 16} | (overrides or {}))).to(dtype)
    router = soft_router(model, **config)
    fluxcompile.attach(model, router)
    return Case(model, router)


def compiled(case: Case, dynamic: bool | None = None, lowering: str = "eager", **options) -> Case:
    """Compile the model in place for training."""
    torch._dynamo.reset()
    options = {"mode": "train", "lowering": lowering, **options}
    case.model.compile(backend="flux", options=options, dynamic=dynamic)
    return case


def soft_router(model: PreTrainedModel, **config) -> FluxRouter:
    """Random weights everywhere, logits of order 1."""
    router = random_router(model, flux_config(**config))
    with torch.no_grad():
        for layer in router.layers:
            layer.head[-1].weight.div_(300.0)
    return router


def noise_for(router: FluxRouter, batch: int, seed: int = 5) -> torch.Tensor:
    """Gumbel noise, fp32 ``[B, L, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(batch, len(router.layer_names), 2, generator=generator)
    return -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))


@dataclass(frozen=True)
class Step:
    """One forward and backward: loss, shares ``[B, L]`` and the gradient of every parameter."""

    loss: torch.Tensor
    shares: torch.Tensor
    gradients: dict[str, torch.Tensor]


def labels_of(prompt: Prompt) -> torch.Tensor:
    """Next-token labels, -100 where there is no token."""
    return prompt.ids.masked_fill(prompt.valid == 0, -100)


def lm_loss(model: PreTrainedModel, prompt: Prompt) -> torch.Tensor:
    """Next-token loss in the model's dtype; with ``labels``, HF would round logits to fp32."""
    logits = model(prompt.ids, attention_mask=prompt.mask, use_cache=False).logits
    return next_token_loss(logits, prompt)


def next_token_loss(logits: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].mT, labels_of(prompt)[:, 1:])


def objective(loss: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The loss, and a term in which every share has a weight of its own."""
    weights = torch.linspace(0.2, 1.0, shares.numel(), device=shares.device)
    return loss + (weights.reshape(shares.shape) * shares).sum() * 0.05


def compiled_step(
    case: Case,
    prompt: Prompt,
    noise: torch.Tensor | None,
    prompt_length: torch.Tensor | None = None,
    hardness: float = 0.0,
) -> Step:
    with soft_routes(
        case.router,
        temperature=TEMPERATURE,
        noise=noise,
        prompt_length=prompt_length,
        hardness=hardness,
    ) as soft:
        loss = lm_loss(case.model, prompt)
        shares = soft.shares()
    return _step(case, loss, shares)


def eager_step(case: Case, prompt: Prompt, noise: torch.Tensor | None, **settings) -> Step:
    """The same in eager mode, by the definition."""
    mixture = Mixture(case.router, TEMPERATURE, noise, **settings)
    before, case.model._compiled_call_impl = case.model._compiled_call_impl, None
    try:
        with eager_mixture(case.model, mixture):
            loss = lm_loss(case.model, prompt)
    finally:
        case.model._compiled_call_impl = before
    return _step(case, loss, mixture.shares())


def _step(case: Case, loss: torch.Tensor, shares: torch.Tensor) -> Step:
    case.router.zero_grad()
    objective(loss, shares).backward()
    gradients = {name: p.grad.clone() for name, p in case.router.named_parameters()}
    return Step(loss.detach(), shares.detach(), gradients)


def assert_same(got: Step, expected: Step, rtol: float = 2e-4, shares: float = 1e-5) -> None:
    """Equal up to fp32 rounding in the router; gradients relative to their tensor's largest."""
    torch.testing.assert_close(got.loss.double(), expected.loss.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.shares, expected.shares, rtol=shares, atol=shares)
    for name, gradient in expected.gradients.items():
        largest = gradient.abs().max()
        assert largest > 0, f"nothing to compare: the gradient of {name} is zero"
        error = (got.gradients[name] - gradient).abs().max() / largest
        assert error < rtol, f"{name}: relative error {error:.1e}"
