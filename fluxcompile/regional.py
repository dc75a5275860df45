"""Compile a model's decoder layers, equal ones once, and leave what is around them as it is."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fluxcompile.attachment import attachment_of
from fluxcompile.backend import compile_graph
from fluxcompile.cache_argument import CACHE_ARGUMENTS
from fluxcompile.errors import OptionError, RouterError
from fluxcompile.layer_table import LayerTable
from fluxcompile.model_layers import attention_layers
from fluxcompile.one_layer_cache import view_of
from fluxcompile.options import CompileOptions
from fluxcompile.packed_rows import holds_packed_rows


@dataclass(frozen=True, eq=False)
class RegionalFlux:
    """The backend for the decoder layers of one model."""

    options: CompileOptions
    table: LayerTable

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, self.options, table=self.table)


class LayerCall:
    """A decoder layer's compiled call: ``run``, common to layers of its kind, on this layer."""

    def __init__(self, run: Callable[..., Any], layer: nn.Module, attention: nn.Module) -> None:
        self._run = run
        self._layer = layer
        self._attention = attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if holds_packed_rows(kwargs):
            return self._layer._call_impl(*args, **kwargs)
        index = getattr(self._attention, "layer_idx", None)
        for name in CACHE_ARGUMENTS:
            if isinstance(index, int) and kwargs.get(name) is not None:
                kwargs[name] = view_of(kwargs[name], index)
        return self._run(self._layer, *args, **kwargs)


def compile_regions(
    model: nn.Module, options: CompileOptions, **torch_options: Any
) -> dict[nn.Module, Callable[..., Any]]:
    """What each decoder layer's compiled call becomes.

    Raises:
        OptionError: the model has no stack of decoder layers.
    """
    names = _attention_names(model)
    backend = RegionalFlux(options, LayerTable(model, names))
    runs: dict[Hashable, Callable[..., Any]] = {}
    calls: dict[nn.Module, Callable[..., Any]] = {}
    for name in names:
        layer = _decoder_layer(model, name)
        kind = _kind(layer)
        if kind not in runs:
            runs[kind] = torch.compile(_code_of_its_own(), backend=backend, **torch_options)
        calls[layer] = LayerCall(runs[kind], layer, model.get_submodule(name))
    return calls


def _attention_names(model: nn.Module) -> tuple[str, ...]:
    try:
        return tuple(attention_layers(model))
    except RouterError:
        attachment = attachment_of(model)
        if attachment is None:
            raise
        return attachment.router.layer_names


def _decoder_layer(model: nn.Module, name: str) -> nn.Module:
    """The element of an ``nn.ModuleList`` that the attention called ``name`` is in, or is."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    raise OptionError.mismatch("regional", "attentions inside of an nn.ModuleList", name)


def _kind(layer: nn.Module) -> Hashable:
    """Equal for layers that differ in their weights and their number alone.

    It only says which layers share a count of recompilations; Dynamo's guards say which share code.
    """
    modules = tuple(
        (path, type(module), tuple(sorted(_settings(module).items())))
        for path, module in layer.named_modules()
    )
    weights = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    return modules, weights


def _settings(module: nn.Module) -> dict[str, str]:
    plain = (bool, int, float, str, type(None))
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "layer_idx"
    }


def _code_of_its_own() -> Callable[..., Any]:
    """``layer._call_impl`` behind a code object of its own, which Dynamo counts by."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "decoder_layer")
