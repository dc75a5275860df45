"""A compiled model and the eager definition of what it should generate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fluxcompile
from tests.parity.decide import decide, margins
from tests.parity.harness import all_rows, compiled, definition_of
from tests.parity.models import Prompt, flux_config, forced_router, random_router, tiny_model
from tests.parity.reference import reference

NEW = 6


@dataclass(frozen=True)
class Case:
    """A compiled model, its eager twin, and what is expected of them.

    Attributes:
        routes: gives bool ``[B, layers]`` for a prompt, True for full; None where every route is
            full and the plain model is expected.
    """

    model: nn.Module
    twin: nn.Module
    routes: Callable[[Prompt], torch.Tensor] | None

    @torch.no_grad()
    def generate(self, given: Prompt, **options) -> torch.Tensor:
        return _tokens(self.model, given, **options)

    @torch.no_grad()
    def expected(self, given: Prompt, rows: int = 1, **options) -> torch.Tensor:
        """What the eager twin generates by ``options``, with ``rows`` sequences a prompt."""
        context = contextlib.nullcontext()
        if self.routes is not None:
            full = self.routes(given).repeat_interleave(rows, dim=0)
            context = reference(self.twin, definition_of(full, flux_config()))
        with context:
            return _tokens(self.twin, given, **options)


MODES = ("full", "router", "sparse", "pattern")


def case(mode: str, strict: bool = True) -> Case:
    """``full``: a router that decides for full attention; ``router``: one that tells rows apart;
    ``sparse`` and ``pattern``: without a router."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    if mode in ("full", "router"):
        make = random_router if mode == "router" else _all_full
        router = make(model)
        fluxcompile.attach(model, router)
        compiled(model, strict=strict)
        return Case(model, twin, None if mode == "full" else _decided_by(twin, router))
    pattern = {"sparse": (0, 0), "pattern": (0, 1)}[mode]
    compiled(model, routes=pattern, config=flux_config(), strict=strict)
    return Case(model, twin, lambda given: all_rows(given.ids.shape[0], pattern))


def _all_full(model: nn.Module) -> fluxcompile.FluxRouter:
    return forced_router(model, full=True)


def _decided_by(twin: nn.Module, router) -> Callable[[Prompt], torch.Tensor]:
    def routes(given: Prompt) -> torch.Tensor:
        assert margins(twin, router, given) > 1e-3, "another seed: this router nearly ties"
        return decide(twin, router, given)

    return routes


def _tokens(model: nn.Module, given: Prompt, **options) -> torch.Tensor:
    """New tokens ``[rows, N]``."""
    defaults = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    seed = options.pop("seed", 0)
    torch.manual_seed(seed)
    out = model.generate(given.ids, attention_mask=given.mask, **(defaults | options))
    return out[:, given.ids.shape[1] :]
