"""Loads kernels on their first use, so that importing the package never imports Triton."""

import functools
import importlib
from types import ModuleType

from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.masks.flags import LONG_ROWS


def triton_module(mode: str) -> ModuleType:
    """Return ``fluxcompile.kernels.<mode>.triton``.

    Raises:
        KernelError: Triton is not installed.
    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise KernelError.mismatch(
            f"the {mode} kernel on CUDA",
            "Triton; install it with `pip install fluxcompile[gpu]`",
            f"no module to import ({error})",
        ) from error
    return importlib.import_module(f"fluxcompile.kernels.{mode}.triton")


def hopper_module(
    mode: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    flags: Tensor | None,
    softcap: float,
) -> ModuleType | None:
    """Return ``fluxcompile.kernels.<mode>.hopper`` where it serves the operands, otherwise None.

    Args:
        bounds: None: every key is valid.
    """
    triton_module(mode)  # its absence is an error, not a reason to go without
    if bounds is not None and (flags is None or not flags[LONG_ROWS]):
        return None
    streaming, chosen = _hopper("streaming"), _hopper(mode)
    return chosen if streaming is not None and streaming.serves(q, k, v, softcap) else None


@functools.cache
def _hopper(mode: str) -> ModuleType | None:
    """The warp-specialised kernel, or None where this Triton lacks the Gluon it is built on."""
    try:
        return importlib.import_module(f"fluxcompile.kernels.{mode}.hopper")
    except (ImportError, AttributeError):
        return None
