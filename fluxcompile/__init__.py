"""fluxcompile: Flux Attention (arXiv 2604.07394) as a ``torch.compile`` backend.

``model.compile(backend="flux")`` finds the backend through its entry point, and :func:`compile` is
that in one call with the router; the other names are what surrounds it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fluxcompile.attachment import attach, detach
from fluxcompile.cache_memory import CacheMemory
from fluxcompile.compile_model import compile
from fluxcompile.config import FluxConfig
from fluxcompile.errors import (
    CacheError,
    ConfigError,
    DataError,
    FluxError,
    FluxWarning,
    KernelError,
    OptionError,
    RewriteError,
    RouterError,
    TorchVersionError,
    TrainingError,
)
from fluxcompile.inspection import explain, routes
from fluxcompile.packaged import packaged_routers
from fluxcompile.report import FluxReport
from fluxcompile.route_record import Routes
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import SoftRoutes, soft_routes

if TYPE_CHECKING:
    from fluxcompile.cache import FluxCache
    from fluxcompile.training import adapt_backbone, train_router

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CacheMemory",
    "ConfigError",
    "DataError",
    "FluxCache",
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
    "TorchVersionError",
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

#: what brings transformers along, for those who use it only: name -> module
_LATER = {
    "FluxCache": "fluxcompile.cache",
    "adapt_backbone": "fluxcompile.training",
    "train_router": "fluxcompile.training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
