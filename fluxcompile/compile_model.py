"""``fluxcompile.compile``: attach a router and compile a model in place, in one call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fluxcompile.attachment import attach
from fluxcompile.backend import compile_graph
from fluxcompile.errors import OptionError
from fluxcompile.options import CompileOptions
from fluxcompile.packed_rows import ModelCall
from fluxcompile.regional import compile_regions
from fluxcompile.router import FluxRouter

#: what :func:`compile` has put on modules, and the settings it had then
_ours: weakref.WeakKeyDictionary[Callable[..., Any], tuple] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Flux:
    """The backend with its options: equal options share what Dynamo has compiled."""

    options: CompileOptions

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, self.options)


def compile(
    model: nn.Module,
    router: FluxRouter | str | os.PathLike[str] | None = None,
    *,
    regional: bool | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    inductor_mode: str | None = None,
    **options: Any,
) -> nn.Module:
    """Compile ``model`` in place with the backend ``flux``, and return it.

    In place, so that ``model.generate`` runs what was compiled: ``torch.compile(model)`` returns a
    wrapper that ``generate`` does not call. Nothing is traced before the first call. Called again,
    it replaces what it did before; with the same router and options nothing is compiled anew.

    Args:
        model: a model that nothing else has compiled.
        router: a router, a directory, a packaged router's name or a hub id to attach; None keeps
            what is attached.
        regional: True compiles decoder layers, equal ones once: the first call is ready much
            sooner, what is around the layers runs eagerly, and each token costs Python time for
            each layer. False compiles the model as a whole, and so does None, for now.
        dynamic, fullgraph: as for ``torch.compile``.
        inductor_mode: Inductor's mode, ``torch.compile``'s own ``mode``.
        options: the backend's options: ``config``, ``mode``, ``routes``, ``strict``, ``lowering``,
            ``inductor``.

    Raises:
        OptionError: unknown option or bad value; ``model`` is no module, or compiled otherwise.
        RouterError: the router cannot be loaded, or belongs to another model.
    """
    if regional not in (None, False, True):
        raise OptionError.mismatch("regional", "None, False or True", repr(regional))
    parsed = CompileOptions.parse(options, inductor_mode)  # now, not at the first call
    _check_model(model)
    if router is not None:
        attach(model, router)
    wanted = regional, parsed, dynamic, fullgraph
    how = {"dynamic": dynamic, "fullgraph": fullgraph}
    calls = compile_regions(model, parsed, **how) if regional else {}
    whole = model._call_impl
    if not regional:
        whole = torch.compile(whole, backend=Flux(parsed), **how)
    # Disabled, as whoever compiles the model from outside (generate does, on a GPU with a static
    # cache) would trace through to what is not compiled; what is compiled inside runs compiled.
    calls[model] = torch.compiler.disable(ModelCall(whole, model, parsed))
    if all(_settings_of(module) == wanted for module in calls):
        return model
    _undo(model)
    for module, call in calls.items():
        module._compiled_call_impl = call
        _ours[call] = wanted
    return model


def _settings_of(module: nn.Module) -> tuple | None:
    compiled = module._compiled_call_impl
    return None if compiled is None else _ours.get(compiled)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError.mismatch("model", "a torch.nn.Module", type(model).__name__)
    for path, module in model.named_modules():
        compiled = module._compiled_call_impl
        where = f"{type(model).__name__}{path and '.' + path}"
        if hasattr(module, "_orig_mod"):
            raise OptionError.mismatch(
                "model",
                "a plain model (generate does not run torch.compile's wrapper)",
                f"torch.compile's wrapper at {where}: pass its _orig_mod",
            )
        if compiled is not None and compiled not in _ours:
            raise OptionError.mismatch(
                "model",
                "one that nothing else has compiled",
                f"{where}, compiled by its compile(): set its _compiled_call_impl to None first",
            )


def _undo(model: nn.Module) -> None:
    for module in model.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None
