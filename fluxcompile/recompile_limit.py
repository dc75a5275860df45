"""Dynamo's limits on how often it compiles one piece of code: past them it runs eagerly, unrouted.

Code here is a Python code object, which all models of a class share, or all decoder layers.
"""

from __future__ import annotations

import types
import warnings
import weakref
from typing import Any

import torch

from fluxcompile.errors import FluxWarning
from fluxcompile.torch_internals import internal

TracingContext = internal("torch._guards", "TracingContext")

#: no local variable has this name, so Dynamo counts what is marked so against no frame's limit
_NO_LOCAL = "(flux)"


class Allowance:
    """Marks the graphs that count together, as Dynamo marks those of one module object."""


_allowances: weakref.WeakValueDictionary[Any, Allowance] = weakref.WeakValueDictionary()


def allowance_of(key: Any) -> Allowance | None:
    """Return what to mark the graph in the making with; None once ``key`` has used its allowance.

    Args:
        key: hashable; each key may have ``torch._dynamo.config.recompile_limit`` graphs before they
            count as any others do. Dynamo's accumulated limit holds in any case.
    """
    allowance = _allowances.setdefault(key, Allowance())
    mark = weakref.ref(allowance)
    marks = (entry.guard_manager.id_matched_objs.get(_NO_LOCAL) for entry in _cache_entries())
    used = sum(found is mark for found in marks)
    return allowance if used < torch._dynamo.config.recompile_limit else None


def allow(builder: Any, allowance: Allowance) -> None:
    """Mark the graph whose guards ``builder``, Dynamo's ``GuardBuilder``, makes."""
    builder.id_matched_objs[_NO_LOCAL] = weakref.ref(allowance)


def warn_of_last_graph() -> None:
    """Warn if Dynamo compiles no further graph of the code that it is tracing now."""
    limit = _limit_reached()
    if limit is not None:
        warnings.warn(
            f"Dynamo has now compiled as many graphs of this code as torch._dynamo.config.{limit} "
            "allows: a call that none of them fits runs eagerly, without routes. Raise that "
            "limit (before compiling), or set torch._dynamo.config.fail_on_recompile_limit_hit",
            FluxWarning,
            stacklevel=2,
        )


def _limit_reached() -> str | None:
    from torch._dynamo import cache_size, config

    frame = _traced_frame()
    if frame is None:
        return None
    local = types.SimpleNamespace(f_locals=frame.f_locals)
    entries = _cache_entries()
    if len(entries) + 1 >= config.accumulated_recompile_limit:
        return "accumulated_recompile_limit"
    together = sum(cache_size._has_same_id_matched_objs(local, entry) for entry in entries)
    if together + 1 >= config.recompile_limit:
        return "recompile_limit"
    return None


def _cache_entries() -> list[Any]:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    frame = _traced_frame()
    return [] if frame is None else _debug_get_cache_entry_list(frame.f_code)


def _traced_frame() -> Any:
    """What Dynamo is tracing now (``f_code`` and ``f_locals``), or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if TracingContext.try_get() is None:
        return None
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # lowered later than traced
        return None
