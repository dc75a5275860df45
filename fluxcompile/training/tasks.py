"""Tasks: what share of a model's layers should be sparse on which kind of prompt.

Flux Attention (arXiv 2604.07394) trains towards one target ``t`` a task: 0.45 of the layers sparse
where the answer hangs on a few far tokens (*retrieval*: single- and multi-document QA), all of
them where it hangs on the gist (*holistic*: summarisation, code, in-context learning).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fluxcompile.errors import DataError


@dataclass(frozen=True)
class Task:
    """A name that examples carry, and what the router is pushed towards on them.

    Attributes:
        name: the value of an example's ``task``.
        kind: ``"retrieval"``, ``"holistic"``, or ``"custom"`` for a target of the caller's own.
        target: wanted share of layers on sparse attention (the model sparsity ratio), in [0, 1].
    """

    name: str
    kind: str
    target: float


BUILT_IN = {
    "retrieval": Task("retrieval", "retrieval", 0.45),
    "holistic": Task("holistic", "holistic", 1.0),
}


def resolve_tasks(tasks: Mapping[str, float | str] | None = None) -> dict[str, Task]:
    """All known tasks by name: ``"retrieval"``, ``"holistic"``, then the caller's in their order.

    Args:
        tasks: name → target in [0, 1], or name → the built-in task whose kind and target it
            takes. A built-in name with a number keeps its kind and changes its target.

    Raises:
        DataError: a name is not a non-empty string, or a value is neither of the two.
    """
    if tasks is not None and not isinstance(tasks, Mapping):
        raise DataError.mismatch("tasks", "a mapping of names to targets", type(tasks).__name__)
    resolved = dict(BUILT_IN)
    for name, value in (tasks or {}).items():
        if not isinstance(name, str) or not name.strip():
            raise DataError.mismatch("tasks", "names that are non-empty strings", repr(name))
        resolved[name] = _task(name, value)
    return resolved


def _task(name: str, value: float | str) -> Task:
    if (
        isinstance(value, str)
        and value in BUILT_IN
        and BUILT_IN.get(name) in (None, BUILT_IN[value])
    ):
        return replace(BUILT_IN[value], name=name)
    if _is_share(value):
        kind = BUILT_IN[name].kind if name in BUILT_IN else "custom"
        return Task(name, kind, float(value))
    raise DataError.mismatch(
        f"tasks[{name!r}]", f"a target in [0, 1] or one of {list(BUILT_IN)}", repr(value)
    )


def _is_share(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1
