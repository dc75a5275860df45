"""How the compiler is set while it is judged."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_silent_eager() -> Iterator[None]:
    """Past its limit of recompiles Dynamo raises instead of running the model as it is.

    That would be full attention, under whatever routes are on record.
    """
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
