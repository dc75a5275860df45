"""Loads a Triton kernel on its first use, so that importing the package never imports Triton."""

import importlib
from types import ModuleType

from fluxcompile.errors import KernelError


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
