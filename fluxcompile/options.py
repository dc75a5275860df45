"""The backend's options: what ``torch.compile(model, backend="flux", options={...})`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fluxcompile.config import FluxConfig
from fluxcompile.errors import OptionError
from fluxcompile.router import FluxRouter

LOWERINGS = ("inductor", "aot_eager", "eager")
ROUTE_WORDS = ("router", "full", "sparse", "locked")
MODES = ("infer", "train")


@dataclass(frozen=True)
class CompileOptions:
    """Validated options.

    Attributes:
        router: a ``FluxRouter``, or a directory or hub id to load one from. Default: the router
            attached to the model.
        config: the ``FluxConfig`` (or a dict of its fields) for static routes. Default: the
            router's, else ``FluxConfig()``.
        mode: ``"infer"``, or ``"train"`` for graphs that can be differentiated: each routed layer
            computes a mixture of full and sparse attention whose shares train the router (see
            ``fluxcompile.soft_routes``). Not Inductor's mode, which is ``torch.compile``'s own
            argument.
        routes: ``"router"``, ``"full"``, ``"sparse"``, or one 0/1 a layer (1 is full attention).
            A static pattern compiles to no branch at all. None: the router if there is one. With
            mode ``"train"`` also ``"locked"``: the router decides, by argmax as in inference,
            and is not trained; gradients reach the model.
        strict: raise instead of falling back to full attention.
        lowering: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"``.
        inductor: Inductor options for the ``"inductor"`` lowering.
        inductor_mode: Inductor's mode, ``torch.compile``'s ``mode``.

    Raises:
        OptionError: unknown option or bad value.
    """

    router: FluxRouter | None = None
    config: FluxConfig | None = None
    mode: str = "infer"
    routes: str | tuple[int, ...] | None = None
    strict: bool = False
    lowering: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    inductor_mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, inductor_mode: str | None) -> CompileOptions:
        """Build from what the user passed to ``torch.compile`` as ``options`` and ``mode``."""
        given = dict(options or {})
        known = [f.name for f in fields(cls) if f.name != "inductor_mode"]
        unknown = sorted(str(name) for name in given if name not in known)
        if unknown:
            raise OptionError(f"options: expected any of {known}, got unknown {unknown}")
        mode = _our_mode(given.get("mode", "infer"))
        routes = _routes(given.get("routes"))
        if routes == "locked" and mode != "train":
            raise OptionError('routes: expected "locked" with mode "train" only, got it without')
        return cls(
            router=_router(given.get("router")),
            config=_config(given.get("config")),
            mode=mode,
            routes=routes,
            strict=_flag("strict", given.get("strict", False)),
            lowering=_one_of("lowering", given.get("lowering", "inductor"), LOWERINGS),
            inductor=_inductor(given.get("inductor")),
            inductor_mode=_inductor_mode(inductor_mode),
        )

    def inductor_patches(self) -> dict[str, Any]:
        """Inductor's configuration: the mode's settings, overridden by ``inductor``."""
        from torch._inductor import list_mode_options

        patches = dict(list_mode_options(self.inductor_mode)) if self.inductor_mode else {}
        patches.update(self.inductor)
        return patches


def _router(value: Any) -> FluxRouter | None:
    if isinstance(value, str | os.PathLike):
        return FluxRouter.from_pretrained(value)
    if value is None or isinstance(value, FluxRouter):
        return value
    raise OptionError(f"router: expected a FluxRouter or a path, got {type(value).__name__}")


def _config(value: Any) -> FluxConfig | None:
    if isinstance(value, Mapping):
        return FluxConfig.from_dict(value)
    if value is None or isinstance(value, FluxConfig):
        return value
    raise OptionError(f"config: expected a FluxConfig or its fields, got {type(value).__name__}")


def _routes(value: Any) -> str | tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _one_of("routes", value, ROUTE_WORDS)
    if isinstance(value, Sequence) and all(entry in (0, 1) for entry in value) and len(value):
        return tuple(int(entry) for entry in value)
    raise OptionError(
        f"routes: expected one of {list(ROUTE_WORDS)} or one 0/1 a layer, got {value!r}"
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name}: expected True or False, got {value!r}")
    return value


def _one_of(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise OptionError(f"{name}: expected one of {list(known)}, got {value!r}")
    return value


def _inductor(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(f"inductor: expected a mapping, got {type(value).__name__}")
    from torch._inductor import list_options

    patches = {str(name).replace("-", "_"): setting for name, setting in value.items()}
    unknown = sorted(set(patches) - set(list_options()))
    if unknown:
        raise OptionError(f"inductor: expected Inductor options, got unknown {unknown}")
    return patches


def _our_mode(value: Any) -> str:
    if value not in MODES:
        raise OptionError(
            f"mode: expected one of {list(MODES)} (Inductor's is torch.compile's own argument, "
            f"fluxcompile.compile's inductor_mode), got {value!r}"
        )
    return value


def _inductor_mode(mode: str | None) -> str | None:
    if mode is None:
        return None
    from torch._inductor import list_mode_options

    return _one_of("mode", mode, list(list_mode_options()))
