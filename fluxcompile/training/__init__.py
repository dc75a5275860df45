"""Training layer routers on a frozen model (arXiv 2604.07394), and what surrounds it.

Names are imported when first used: data can be prepared without waiting for the trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "RouterTrainingArguments": "arguments",
    "Task": "tasks",
    "prepare": "examples",
    "resolve_tasks": "tasks",
    "train_router": "train",
}

__all__ = [
    "RouterTrainingArguments",
    "Task",
    "prepare",
    "resolve_tasks",
    "train_router",
]

if TYPE_CHECKING:
    from fluxcompile.training.arguments import RouterTrainingArguments
    from fluxcompile.training.examples import prepare
    from fluxcompile.training.tasks import Task, resolve_tasks
    from fluxcompile.training.train import train_router


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
