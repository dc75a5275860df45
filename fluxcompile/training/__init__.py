"""Training layer routers on a frozen model (arXiv 2604.07394), and what surrounds it.

Names are imported when first used: data can be prepared without waiting for the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CompiledTrainingArguments": "compiled_arguments",
    "RouterTrainingArguments": "arguments",
    "Task": "tasks",
    "adapt_backbone": "adapt",
    "builtin_mixture": "data",
    "entropy_routes": "baselines",
    "greedy_routes": "baselines",
    "prepare": "examples",
    "random_routes": "baselines",
    "resolve_tasks": "tasks",
    "retarget_router": "retarget",
    "train_router": "train",
}

__all__ = [
    "CompiledTrainingArguments",
    "RouterTrainingArguments",
    "Task",
    "adapt_backbone",
    "builtin_mixture",
    "entropy_routes",
    "greedy_routes",
    "prepare",
    "random_routes",
    "resolve_tasks",
    "retarget_router",
    "train_router",
]

if TYPE_CHECKING:
    from fluxcompile.training.adapt import adapt_backbone
    from fluxcompile.training.arguments import RouterTrainingArguments
    from fluxcompile.training.baselines import entropy_routes, greedy_routes, random_routes
    from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
    from fluxcompile.training.data import builtin_mixture
    from fluxcompile.training.examples import prepare
    from fluxcompile.training.retarget import retarget_router
    from fluxcompile.training.tasks import Task, resolve_tasks
    from fluxcompile.training.train import train_router


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
