"""What fluxcompile needs of PyTorch that PyTorch promises to nobody.

A nightly build may rename any of it. Then the first compilation says so, with the versions that are
known to work, instead of failing somewhere inside.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch

from fluxcompile.errors import TorchVersionError

#: kept in step with pyproject.toml by tests/faults/test_torch_drift.py
SUPPORTED = "torch>=2.11"
TESTED = "2.11 and 2.13"


def internal(module: str, name: str) -> Any:
    """``name`` of ``module``.

    Raises:
        TorchVersionError: this PyTorch has no such thing.
    """
    with naming_versions():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def naming_versions() -> Iterator[None]:
    """Inside, whatever is missing from PyTorch's internals raises TorchVersionError."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        missing = _missing(error)
        if missing is None or isinstance(error, TorchVersionError):
            raise
        raise TorchVersionError(
            f"{missing}: expected {SUPPORTED} (tested with {TESTED}), got torch "
            f"{torch.__version__}, which has no such thing"
        ) from error


def _missing(error: AttributeError | ImportError) -> str | None:
    """The internal that an error is about, None for any other error."""
    if isinstance(error, ImportError):
        name = error.name or ""
        what = re.search(r"cannot import name '(\w+)'", error.msg or "")
        if not name.startswith("torch._"):
            return None
        return f"{name}.{what[1]}" if what else name
    owner = error.obj if isinstance(error.obj, types.ModuleType | type) else type(error.obj)
    home = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    if not home.startswith("torch._"):
        return None
    path = home if isinstance(owner, types.ModuleType) else f"{home}.{owner.__qualname__}"
    return f"{path}.{error.name}"
