"""fluxcompile: Flux Attention (arXiv 2604.07394) as a ``torch.compile`` backend.

``model.compile(backend="flux")`` finds the backend through its entry point, and :func:`compile` is
that in one call with the router; the other names are what surrounds it.
"""

from typing import TYPE_CHECKING, Any

from fluxcompile.attachment import attach, detach
from fluxcompile.compile_model import compile
from fluxcompile.config import FluxConfig
from fluxcompile.errors import (
    ConfigError,
    DataError,
    FluxError,
    FluxWarning,
    KernelError,
    OptionError,
    RewriteError,
    RouterError,
    TrainingError,
)
from fluxcompile.inspection import explain, routes
from fluxcompile.packaged import packaged_routers
from fluxcompile.report import FluxReport
from fluxcompile.route_record import Routes
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import SoftRoutes, soft_routes

if TYPE_CHECKING:
    from fluxcompile.training import adapt_backbone, train_router

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "FluxConfig",
    "FluxError",
    "FluxReport",
    "FluxRouter",
    "FluxWarning",
    "KernelError",
    "OptionError",
    "RewriteError",
    "RouterError",
    "Routes",
    "SoftRoutes",
    "TrainingError",
    "adapt_backbone",
    "attach",
    "compile",
    "detach",
    "explain",
    "packaged_routers",
    "routes",
    "soft_routes",
    "train_router",
]

_TRAINING = ("adapt_backbone", "train_router")


def __getattr__(name: str) -> Any:
    # Training brings transformers' Trainer along: only for those who train.
    if name in _TRAINING:
        from fluxcompile import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
