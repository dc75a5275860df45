"""fluxcompile: Flux Attention (arXiv 2604.07394) as a ``torch.compile`` backend.

``torch.compile(model, backend="flux")`` finds the backend through its entry point; the names here
are what surrounds it.
"""

from fluxcompile.attachment import attach, detach
from fluxcompile.config import FluxConfig
from fluxcompile.errors import (
    ConfigError,
    FluxError,
    FluxWarning,
    KernelError,
    OptionError,
    RewriteError,
    RouterError,
)
from fluxcompile.inspection import explain, routes
from fluxcompile.report import FluxReport
from fluxcompile.route_record import Routes
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import SoftRoutes, soft_routes

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
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
    "attach",
    "detach",
    "explain",
    "routes",
    "soft_routes",
]
