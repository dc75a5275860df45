"""The compiled model as a user runs it: a prompt that decides the routes, then what follows it.

The prompt fills a key/value cache in one call; the targets follow on that cache, which keeps the
rows' routes. Nothing of an answer is there when its route is decided.

What follows is scored as greedy generation would say it:

- With streaming attention and sparse decode, a token reads the same keys in a call of many as in a
  call of its own: all targets follow in one call. So they do where every layer is full attention.
- In other modes the targets follow a call a token, if no prompt of the batch has more than
  :data:`STEPS`.
- Of longer ones a call a token would take too long. With triangle attention and sparse decode they
  follow in one call, behind them as many tokens more as that call leaves dense: the targets are
  none of them. In what other modes are left (dense decode, XAttention, PowerAttention) the one call
  is a further piece of prompt, as a next turn of a chat is, and not what generation computes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import DynamicCache

from fluxcompile.attachment import attach, attachment_of, detach
from fluxcompile.cache_argument import cache_argument
from fluxcompile.config import FluxConfig
from fluxcompile.errors import RouterError
from fluxcompile.evaluation.compiling import no_silent_eager
from fluxcompile.evaluation.padding import FILLER, padded, positions
from fluxcompile.evaluation.prompts import Prompt
from fluxcompile.evaluation.scoring import Places, Scores, score
from fluxcompile.generation import say_that_it_grows
from fluxcompile.model_layers import attention_layers, unwrap
from fluxcompile.route_record import Routes, routes_of
from fluxcompile.router import FluxRouter
from fluxcompile.training.backbone import attached, check_trainable, frozen
from fluxcompile.training.language_model import LanguageModel

STEPS = 64  # targets that follow a call a token, where one call is not the same


@dataclass(frozen=True, eq=False)
class AsUser:
    """Scores batches of prompts through one inference compile.

    Attributes:
        model: the model; ``language_model`` its two halves.
        run: the decoder, compiled.
        layer_names: of all attention layers, in order.
        fixed: the routes, one a layer, True for full attention; None if a router decides.
        config: of the sparse attention; None where every layer is full attention.
    """

    model: nn.Module
    language_model: LanguageModel
    run: Callable[..., Any]
    layer_names: tuple[str, ...]
    fixed: tuple[bool, ...] | None
    config: FluxConfig | None

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        model: nn.Module,
        *,
        router: FluxRouter | None = None,
        routes: str | Sequence[int] | None = None,
        config: FluxConfig | None = None,
        lowering: str = "inductor",
    ) -> Iterator[Self]:
        """For ``model`` under a router, or under fixed routes; frozen meanwhile.

        What was compiled before is forgotten: of two compiles of one model Dynamo tries one after
        the other on every call, and soon compiles no more.

        Args:
            model: a causal language model, not compiled.
            router: decides; on the model's device.
            routes: as the backend's option, where there is no router.
            config: of the sparse attention, where there is no router.
            lowering: as the backend's option.

        Raises:
            TrainingError: ``model`` is compiled already.
            RouterError: the router is another model's.
        """
        model = unwrap(model)
        check_trainable(model)
        torch._dynamo.reset()
        options: dict[str, Any] = {"strict": True, "lowering": lowering}
        if router is not None:
            options |= {"router": router}
        else:
            options |= {"routes": routes, "config": config}
        serving = attached(model, router) if router is not None else _unattached(model)
        with no_silent_eager(), serving, frozen(model):
            language_model = LanguageModel.of(model).checked(model)
            run = torch.compile(language_model.body, backend="flux", options=options)
            names = tuple(attention_layers(model)) if router is None else router.layer_names
            fixed = _fixed(routes, len(names)) if router is None else None
            if router is not None:
                config = router.config
            elif routes in ("full", None):
                config = None
            else:
                config = config or FluxConfig()
            yield cls(model, language_model, run, names, fixed, config)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> Scores:
        """Scores of a batch; prompts of one batch are padded to one length, on the left."""
        device = next(self.model.parameters()).device
        cache = DynamicCache(config=self.model.config)
        ids, mask = padded([prompt.prompt for prompt in prompts], device, left=True)
        before = routes_of(self.model)
        states = self._call(ids, mask, positions(mask), cache)[:, -1:]
        full = self._routes(len(prompts), before)
        longest = max(len(prompt.target) for prompt in prompts)
        if self._needs_steps and longest <= STEPS:
            more = self._steps(prompts, mask, cache)
        else:
            more = self._at_once(prompts, mask, cache)
        states = torch.cat([states, *more], dim=1)
        places = Places.of(prompts, device)
        head = self.language_model.to_logits
        return score(states[places.rows, places.order], places, head, full)

    @property
    def _needs_steps(self) -> bool:
        config = self.config
        if config is None:
            return False
        return (config.sparse, config.retrieval, config.decode) != ("streaming", "full", "sparse")

    @property
    def _dense_end(self) -> int:
        """Tokens that have to follow the targets in a call, so that it computes what decoding does.

        Where no number of them would do, none.
        """
        config = self.config
        triangle = "triangle", "full", "sparse"
        exact = config and (config.sparse, config.retrieval, config.decode) == triangle
        return config.last if exact else 0

    def _steps(
        self, prompts: Sequence[Prompt], mask: torch.Tensor, cache: DynamicCache
    ) -> list[torch.Tensor]:
        """``[B, 1, D]`` behind every target but the last, of a call each."""
        targets, valid = padded([prompt.target for prompt in prompts], mask.device)
        states = []
        for i in range(targets.shape[1] - 1):
            mask = torch.cat([mask, valid[:, i : i + 1]], dim=1)
            say_that_it_grows(cache)
            states.append(self._call(targets[:, i : i + 1], mask, positions(mask)[:, -1:], cache))
        return states

    def _at_once(
        self, prompts: Sequence[Prompt], mask: torch.Tensor, cache: DynamicCache
    ) -> list[torch.Tensor]:
        """``[B, S, D]`` behind the targets, of one call; of none if no prompt has two targets."""
        targets, real = padded([prompt.target for prompt in prompts], mask.device)
        if targets.shape[1] == 1:  # the last target is predicted, never read
            return []
        end = (FILLER,) * self._dense_end
        ids, valid = padded([prompt.target + end for prompt in prompts], mask.device)
        # What comes after the targets has no place of its own: the model may know no more places.
        real = torch.nn.functional.pad(real, (0, len(end)))
        places = positions(torch.cat([mask, real], dim=1))[:, mask.shape[1] : -1]
        mask = torch.cat([mask, valid[:, :-1]], dim=1)
        say_that_it_grows(cache)
        return [self._call(ids[:, :-1], mask, places, cache)]

    @functools.cached_property
    def _cache_argument(self) -> str:
        """Looked up once: a target that is decoded alone is a call of its own."""
        return cache_argument(self.model)

    def _call(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Hidden states (or logits) ``[B, S, D]`` of the new tokens ``ids`` ``[B, S]``."""
        several = () if ids.shape[1] == 1 else (ids, places)
        for tensor in (mask, *several):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        taken = {self._cache_argument: cache}
        output = self.run(ids, attention_mask=mask, position_ids=places, use_cache=True, **taken)
        return self.language_model.states(output)

    def _routes(self, batch: int, before: Routes | None) -> torch.Tensor:
        """bool ``[B, L]``; a layer that is never routed counts as full.

        Args:
            batch: B.
            before: the routes on record before this prompt, which are not its own.
        """
        if self.fixed is not None:
            return torch.tensor([self.fixed]).expand(batch, -1)
        found = routes_of(self.model)
        if found is None or found is before or found.fa.shape[0] != batch:
            got = "none" if found in (None, before) else f"{found.fa.shape[0]} rows"
            raise RouterError.mismatch("routes of the last prompt", f"{batch} rows", got)
        columns = {name: found.fa[:, i] for i, name in enumerate(found.layer_names)}
        every = torch.ones_like(found.fa[:, 0])
        return torch.stack([columns.get(name, every) for name in self.layer_names], dim=1)


@contextlib.contextmanager
def _unattached(model: nn.Module) -> Iterator[None]:
    """Without the router that serves ``model`` otherwise."""
    before = attachment_of(model)
    if before is not None:
        detach(model)
    try:
        yield
    finally:
        if before is not None:
            attach(model, before.router)


def _fixed(routes: str | Sequence[int] | None, layers: int) -> tuple[bool, ...]:
    if isinstance(routes, str) or routes is None:
        return (routes != "sparse",) * layers
    return tuple(map(bool, routes))
