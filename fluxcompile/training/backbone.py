"""A user's model during training: frozen, in eval mode, attached, and afterwards as it was."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fluxcompile.attachment import attach, attachment_of, detach
from fluxcompile.errors import TrainingError
from fluxcompile.model_layers import text_config
from fluxcompile.options import CompileOptions
from fluxcompile.regional import compile_regions
from fluxcompile.router import FluxRouter
from fluxcompile.training.examples import Example, prepare
from fluxcompile.training.fingerprint import changed, fingerprint
from fluxcompile.training.processes import gathered
from fluxcompile.training.tasks import Task

_RECOMPILES = 256


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that something else has already compiled or split.

    Raises:
        TrainingError: ``model.compile`` was called, inference being compiled in; or its weights
            are on several devices, or nowhere.
    """
    if model._compiled_call_impl is not None:
        raise TrainingError.mismatch(
            type(model).__name__,
            "a model that is not compiled (training compiles it in its own mode: load it anew, "
            "or set model._compiled_call_impl = None)",
            "one on which compile() was called",
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise TrainingError.mismatch(
            f"weights of {type(model).__name__}",
            "on one device (to use several, launch a process for each)",
            sorted(map(str, devices)),
        )


@contextlib.contextmanager
def attached(model: nn.Module, router: FluxRouter) -> Iterator[None]:
    """Let ``router`` serve ``model`` for a while, in place of any other."""
    before = attachment_of(model)
    attach(model, router)
    try:
        yield
    finally:
        detach(model)
        if before is not None:
            attach(model, before.router)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` in eval mode; parameters and modules get their own settings back after."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def unchanged(model: nn.Module, *, same_everywhere: bool = True) -> Iterator[None]:
    """Check that the block leaves every bit of ``model``'s weights and buffers as it was.

    Args:
        model: in training.
        same_everywhere: check that every process has the same ``model`` to begin with, too.

    Raises:
        TrainingError: it did not, naming what changed; or the processes' models differ to begin
            with.
    """
    before = fingerprint(model)
    for other in gathered(before) if same_everywhere else ():
        if differing := changed(before, other):
            raise TrainingError.mismatch(
                f"weights of {type(model).__name__}",
                "the same in every process",
                f"{len(differing)} that differ, {differing[0]!r} first",
            )
    yield
    differing = changed(before, fingerprint(model))
    if differing:
        raise TrainingError.mismatch(
            f"weights of {type(model).__name__} after training",
            "bit for bit those before",
            f"{len(differing)} changed, {differing[0]!r} first",
        )


def compiled(
    body: nn.Module,
    router: FluxRouter,
    *,
    lowering: str,
    inductor: dict[str, Any] | None = None,
    routes: str | None = None,
) -> Callable[..., Any]:
    """``body`` through the compiler's training mode.

    Args:
        body: the model that ``router`` is attached to, or a part of it.
        router: whose routes are taken.
        lowering: as the backend's option.
        inductor: as the backend's option.
        routes: ``"locked"`` for hard routes that are not trained; None for soft ones.
    """
    options = _options(router, lowering=lowering, inductor=inductor, routes=routes)
    return torch.compile(body, backend="flux", options=options)


class Regions:
    """``body`` with its decoder layers compiled one by one, equal ones once, in each call alone.

    Outside of the call the layers are what they were: the same model with full attention, say, is
    their teacher.

    Args:
        model: what ``router`` is attached to.
        body: it, or the part of it to run.
        router, lowering, inductor: as :func:`compiled` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        body: nn.Module,
        router: FluxRouter,
        *,
        lowering: str,
        inductor: dict[str, Any] | None = None,
    ) -> None:
        options = CompileOptions.parse(_options(router, lowering=lowering, inductor=inductor), None)
        self._body = body
        self._calls = compile_regions(model, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = {layer: layer._compiled_call_impl for layer in self._calls}
        try:
            _call_layers_by(self._calls)
            return self._body(*args, **kwargs)
        finally:
            _call_layers_by(before)


def _call_layers_by(calls: Mapping[nn.Module, Callable[..., Any] | None]) -> None:
    for layer, call in calls.items():
        layer._compiled_call_impl = call


def _options(
    router: FluxRouter,
    *,
    lowering: str,
    inductor: dict[str, Any] | None,
    routes: str | None = None,
) -> dict[str, Any]:
    # The router is named although it is attached: Dynamo hands the graph of one model to the next
    # of the same shape, and only different options tell it not to.
    options = {"mode": "train", "strict": True, "lowering": lowering, "router": router}
    if inductor:
        options["inductor"] = inductor
    if routes is not None:
        options["routes"] = routes
    return options


def running(
    model: nn.Module,
    body: nn.Module,
    router: FluxRouter,
    *,
    regional: bool,
    lowering: str,
    inductor: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``body`` through training mode, as one graph or by regions; arguments as :class:`Regions`."""
    if regional:
        return Regions(model, body, router, lowering=lowering, inductor=inductor)
    return compiled(body, router, lowering=lowering, inductor=inductor)


@contextlib.contextmanager
def compiler_settings(activation_memory_budget: float | None) -> Iterator[None]:
    """PyTorch's compiler as training needs it."""
    settings = {
        # DDP's buckets would split the graph; all of its trained weights fit into one.
        "optimize_ddp": False,
        # Counted over every run of the process, each of which compiles anew.
        "recompile_limit": _RECOMPILES,
        "accumulated_recompile_limit": 4 * _RECOMPILES,
    }
    with torch._dynamo.config.patch(settings):
        if activation_memory_budget is None:
            yield
        else:
            from torch._functorch import config

            with config.patch(activation_memory_budget=activation_memory_budget):
                yield


def examples_for(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    tasks: Mapping[str, Task],
    min_length: int,
    max_length: int,
) -> list[Example]:
    """:func:`prepare` for what ``model`` can take: its vocabulary, and its positions if fewer.

    Raises:
        DataError: data that cannot be used.
    """
    return prepare(
        data,
        tokenizer,
        tasks=tasks,
        min_length=min_length,
        max_length=longest(model, max_length),
        vocab_size=getattr(text_config(model), "vocab_size", None),
    )


def longest(model: nn.Module, max_length: int) -> int:
    """``max_length``, or the positions the model has, if fewer."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return min(max_length, limit) if isinstance(limit, int) else max_length
