"""What the options of ``fluxcompile demo`` come down to."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from fluxcompile import smollm2
from fluxcompile.errors import FluxError, OptionError
from fluxcompile.packaged import packaged_routers
from fluxcompile.training.command import device_and_dtype

PACKAGED_ROUTER = "smollm2-135m"


@dataclass(frozen=True)
class DemoSettings:
    """Settings with every default filled in.

    Attributes:
        tokens: of a prompt.
        max_new_tokens: of an answer.
        routes: what ``options={"routes": ...}`` takes.
        route_note: where they come from, in words.
        router: folder or name of the router that decides them; None for one that is untrained.
        seed: of the two prompts that a router decides for.
        lowering: as the backend's option.
        device: of the model.
        dtype: of the model.
    """

    tokens: int
    max_new_tokens: int
    routes: str | list[int]
    route_note: str
    router: Path | str | None
    seed: int
    lowering: str
    device: str
    dtype: torch.dtype

    @classmethod
    def create(
        cls,
        *,
        tokens: int,
        max_new_tokens: int,
        routes: str | None,
        router: Path | None,
        seed: int,
        lowering: str,
        device: str | None,
        dtype: str | None,
    ) -> Self:
        """Fill in defaults and check what can be checked before the model is loaded.

        Raises:
            OptionError: routes that are not known, or a GPU that is not there.
        """
        device, dtype = device_and_dtype(device, dtype)
        if device == "cpu" and lowering == "inductor" and not _has_cpp_compiler():
            raise FluxError(
                "Inductor needs a C++ compiler on a CPU and none is on PATH: install g++ (or "
                "clang++), or pass --lowering aot_eager"
            )
        chosen, note, deciding = _choose_routes(routes, router)
        return cls(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            routes=chosen,
            route_note=note,
            router=deciding,
            seed=seed,
            lowering=lowering,
            device=device,
            dtype=getattr(torch, dtype),
        )


def _choose_routes(
    routes: str | None, router: Path | None
) -> tuple[str | list[int], str, Path | str | None]:
    """Routes, a note on them, and the router that decides if one does."""
    packaged = PACKAGED_ROUTER if PACKAGED_ROUTER in packaged_routers() else None
    if router is not None:
        if routes not in (None, "router"):
            raise OptionError.mismatch("--routes", '"router" beside --router', f"{routes!r}")
        return "router", f"decided by the router in {router}", router
    if packaged and routes in (None, "router"):
        return "router", f"decided by the trained router {packaged!r} of the package", packaged
    if routes in (None, "static"):
        pattern = smollm2.static_routes()
        dense = ", ".join(str(i) for i, full in enumerate(pattern) if full)
        why = "a fixed pattern" if routes else "a fixed pattern, as no trained router is packaged"
        sparse = f"{smollm2.STATIC_SINK} sink + {smollm2.STATIC_LOCAL} local tokens"
        return pattern, f"{why}: layers {dense} full, the others {sparse}", None
    if routes == "router":
        return routes, "decided by an untrained router (full attention everywhere)", None
    if routes in ("full", "sparse"):
        return routes, f"every layer {routes}", None
    try:
        pattern = [{"0": 0, "1": 1}[entry.strip()] for entry in routes.split(",")]
    except KeyError:
        known = '"static", "router", "full", "sparse" or 0/1 a layer, comma-separated'
        raise OptionError.mismatch("--routes", known, f"{routes!r}") from None
    return pattern, f"as given, {pattern.count(1)} of {len(pattern)} layers full", None


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
